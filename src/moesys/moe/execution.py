"""How a step is carried out, set from outside the model: looked up at every call, never baked in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moesys.kernels import Adapters, Kernel
from moesys.moe.capacity import Capacity
from moesys.moe.dispatch import Dispatcher
from moesys.moe.source import ExpertSource
from moesys.moe.tape import RoutingTape


@dataclass(frozen=True)
class Execution:
    """The dispatcher, expert source and kernel that the MoE layers use in this step.

    ``top_k`` and ``capacity`` change what is computed and not only how. They stand here and not among the layer's
    arguments because a schedule or a sweep sets them from outside, for all layers of a model at once, without a path
    through every block in between, and because recomputation then sees the same ones by construction.

    recompute:      whether blocks are computed again in the backward pass instead of keeping their activations.
    tape:           set by whoever recomputes a block; the layer records its decision there and replays it.
    top_k:          experts per token in this call, which experts that are given must not contradict; None: as the
                    layer was made.
    capacity:       limit of the experts in this call, `Capacity.unbounded()` for none; None: as the layer was made.
    adapters:       low-rank additions to the experts, by layer id.
    checks_logits:  whether NaN or Inf in router logits is an error. Asking costs one wait for the device per layer, so
                    whoever looks at the result anyway, or captures the call in a CUDA graph, switches it off.
    """

    dispatcher: Dispatcher
    source: ExpertSource
    kernel: Kernel = Kernel.AUTO
    recompute: bool = False
    tape: RoutingTape | None = None
    top_k: int | None = None
    capacity: Capacity | None = None
    adapters: Mapping[int, Adapters] | None = None
    checks_logits: bool = True
