"""How a step is carried out, set from outside the model: looked up at every call, never baked in."""

from __future__ import annotations

from dataclasses import dataclass

from moesys.kernels import Kernel
from moesys.moe.dispatch import Dispatcher
from moesys.moe.routing import RoutingTape
from moesys.moe.source import ExpertSource


@dataclass(frozen=True)
class Execution:
    """The dispatcher, expert source and kernel that the MoE layers use in this step.

    recompute:  whether blocks are computed again in the backward pass instead of keeping their activations.
    tape:       set by whoever recomputes a block; the layer records its choices there and replays them.
    """

    dispatcher: Dispatcher
    source: ExpertSource
    kernel: Kernel = Kernel.AUTO
    recompute: bool = False
    tape: RoutingTape | None = None
