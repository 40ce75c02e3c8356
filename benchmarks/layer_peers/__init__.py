"""The systems that one MoE layer is measured on, forward only: one file per implementation, all with the same
contract.

A file defines ``build(variant, weights, top_k)``, which returns a `BuiltLayer` on those weights: softmax router,
k weights scaled to sum to one, SwiGLU experts, nothing dropped. Every one includes its router.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layer_peers.workload import Format, LayerWeights


class UnavailableError(RuntimeError):
    """A system that cannot run this case on this machine; the message says why."""


@dataclass(frozen=True)
class BuiltLayer:
    """compute: (tokens, hidden) to (tokens, hidden), in ``activation_dtype``.

    check_room: raises `UnavailableError` for a number of tokens that would not fit in memory.
    """

    compute: Callable[[Tensor], Tensor]
    activation_dtype: torch.dtype
    check_room: Callable[[int], None] = lambda num_tokens: None


BuildLayer = Callable[[str, LayerWeights, int], BuiltLayer]
"""``build(variant, weights, top_k)`` of a file of this folder."""


@dataclass(frozen=True)
class System:
    """Where a system lives: its file here, its variant, the package it needs, the formats it takes."""

    file: str
    variant: str
    package: str
    formats: tuple[Format, ...] = (Format.FP32, Format.BF16)


OURS = "moesys"
OURS_IN_TORCH = "moesys-torch"

SYSTEMS: dict[str, System] = {
    OURS: System("moesys_layer", "native", "moesys", tuple(Format)),
    OURS_IN_TORCH: System("moesys_layer", "torch", "moesys"),
    "transformers-eager": System("qwen3_experts", "eager", "transformers"),
    "transformers-grouped_mm": System("qwen3_experts", "grouped_mm", "transformers"),
    "transformers-batched_mm": System("qwen3_experts", "batched_mm", "transformers"),
    "loop": System("expert_loop", "as-held", "torch"),
    "loop-widened": System("expert_loop", "widened", "torch", (Format.BF16,)),
    "grouped_mm": System("grouped_mm", "sorted", "torch"),
    "deepspeed": System("deepspeed_layer", "dropless", "deepspeed"),
    "tutel": System("tutel_layer", "dropless", "tutel"),
}


def find_variant(system: str, kernel: str) -> str:
    """The variant that a system is built with; our own is the kernel that the command line names."""
    return kernel if system == OURS else SYSTEMS[system].variant


def load_builder(name: str) -> BuildLayer:
    """Imports the file of system ``name``. Raises `UnavailableError` when its package is not installed."""
    system = SYSTEMS[name]
    if importlib.util.find_spec(system.package) is None:
        raise UnavailableError(f"{system.package} is not installed")
    return importlib.import_module(f"layer_peers.{system.file}").build


def get_dense_weights(weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """The gate-up and down matrices for systems that have no int8 format. Raises `UnavailableError`."""
    gate_up, down = weights.gate_up_EFD, weights.down_EDF
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return gate_up, down
    raise UnavailableError("it has no int8 format of this kind")
