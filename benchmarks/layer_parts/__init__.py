"""The questions that `moe_layer.py` asks, one file each. A case is one row of a question's grid.

A case knows how to measure one system in a fresh process and what the records of all systems say; who runs the
processes, and in which order, is the script's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from harness import Claim, Measured, Spread
from layer_peers.workload import Format

GemmFlops = Mapping[Format, float]
"""The measured rate of a matrix product in the dtype of each format."""


class Case(Protocol):
    """One comparison: the same work, several systems."""

    @property
    def name(self) -> str: ...

    @property
    def systems(self) -> tuple[str, ...]: ...

    def measure(self, system: str) -> dict[str, Any]:
        """Runs in the system's own process. Raises `UnavailableError` where it cannot run."""
        ...

    def deserves_pass(self, system: str, measured: Measured) -> bool:
        """Whether another pass of the system could change a claim."""
        ...

    def make_claims(self, measured: Measured) -> list[Claim]: ...

    def format(self, measured: Measured, gemm_flops: GemmFlops) -> str:
        """A table for people."""
        ...

    def compute_shares(self, measured: Measured, gemm_flops: GemmFlops) -> dict[str, Spread]:
        """What a plot shows: the share of its ceiling that each system reached."""
        ...
