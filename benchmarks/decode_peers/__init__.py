"""The systems that write tokens in `offload.py`: one file per system, all with the same contract.

A file defines ``open_system(variant, task)``, a context in which a model of the task's folder computes. Importing the
file imports the system's library and builds nothing, so that the idle process can be weighed in between.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from decode_peers.traffic import Traffic
from decode_peers.workload import Format, Phase, Task


class UnavailableError(RuntimeError):
    """A system that cannot run this task on this machine; the message says why."""


class Decoding(Protocol):
    """A model that continues sequences. Greedy choices are returned; what is fed next is the caller's business."""

    def begin(self, phase: Phase, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Forgets what was there, reads the prompts, and returns the likeliest token after each."""
        ...

    def step(self, tokens: Sequence[int]) -> list[int]:
        """Adds a token to each sequence, all in one pass, and returns the likeliest next ones."""
        ...

    def mark(self) -> None:
        """Says that what counts begins now."""
        ...

    def count_traffic(self) -> Traffic | None:
        """What was read since `mark`; None where experts do not come from the disk one by one."""
        ...


OpenSystem = Callable[[str, Task], AbstractContextManager[Decoding]]
"""``open_system(variant, task)`` of a file of this folder."""


@dataclass(frozen=True)
class System:
    """Where a system lives: its file here, its variant, the package it needs, the formats of weights it takes.

    is_capped: whether it runs under the cap of a capped case.
    """

    file: str
    variant: str
    package: str
    formats: tuple[Format, ...] = (Format.BF16,)
    is_capped: bool = True


OURS = "moesys"
RESIDENT = "moesys-resident"
LLAMA = "llama.cpp"
TRANSFORMERS = "transformers"
ACCELERATE = "accelerate"

SYSTEMS: dict[str, System] = {
    OURS: System("ours", "budget", "moesys", tuple(Format)),
    RESIDENT: System("ours", "resident", "moesys", tuple(Format), is_capped=False),
    LLAMA: System("llama_cpp", "mmap", "llama_cpp", tuple(Format)),
    TRANSFORMERS: System("transformers_olmoe", "resident", "transformers"),
    ACCELERATE: System("transformers_olmoe", "disk", "accelerate"),
}


def load_opener(name: str) -> OpenSystem:
    """Imports the file of system ``name``. Raises `UnavailableError` when its package is not installed."""
    system = SYSTEMS[name]
    if importlib.util.find_spec(system.package) is None:
        raise UnavailableError(f"{system.package} is not installed")
    return importlib.import_module(f"decode_peers.{system.file}").open_system
