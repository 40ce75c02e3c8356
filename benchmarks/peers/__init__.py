"""The systems that one training step is measured on: one file per network, all with the same contract.

A file defines ``build(variant, shape, arithmetic)``, which returns a ``Trainee``. Importing the file imports
the system's library and builds nothing, so that the idle process can be weighed in between.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from peers.workload import Batch, Shape

Arithmetic = Literal["fp32", "bf16"]


class UnavailableError(RuntimeError):
    """A system that cannot run on this machine; the message says why."""


class Trainee(Protocol):
    """A network with its optimizer."""

    def step(self, batch: Batch) -> float:
        """One whole training step, from zeroed gradients to updated weights. Returns the loss."""
        ...

    def count_dropped(self) -> float | None:
        """The share of the last step's assignments that were dropped; None where that cannot happen."""
        ...


BuildTrainee = Callable[[str, Shape, Arithmetic], Trainee]
"""``build(variant, shape, arithmetic)`` of a file of this folder."""


@dataclass(frozen=True)
class System:
    """Where a system lives: its file here, the variant it is built with, the package it needs."""

    file: str
    variant: str
    package: str


SYSTEMS: dict[str, System] = {
    "moesys": System("moesys_decoder", "metered", "moesys"),
    "moesys-unmetered": System("moesys_decoder", "unmetered", "moesys"),
    "transformers-eager": System("qwen3_moe", "eager", "transformers"),
    "transformers-grouped_mm": System("qwen3_moe", "grouped_mm", "transformers"),
    "transformers-batched_mm": System("qwen3_moe", "batched_mm", "transformers"),
    "deepspeed": System("deepspeed_moe", "capacity", "deepspeed"),
    "deepspeed-dropless": System("deepspeed_moe", "dropless", "deepspeed"),
    "tutel": System("tutel_moe", "capacity", "tutel"),
    "loop": System("sorted_loop", "unbind", "torch"),
    "dense": System("dense", "swiglu", "torch"),
}


def load_builder(name: str) -> BuildTrainee:
    """Imports the file of system ``name``. Raises UnavailableError when its package is not installed."""
    system = SYSTEMS[name]
    if importlib.util.find_spec(system.package) is None:
        raise UnavailableError(f"{system.package} is not installed")
    return importlib.import_module(f"peers.{system.file}").build
