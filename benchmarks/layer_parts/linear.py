"""One row through one matrix after the other: the dense half of a decoded token, beside torch's own product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness import Claim, Measured, Spread, Timing
from layer_parts import GemmFlops, streams
from layer_peers import OURS
from layer_peers.workload import (
    Format,
    Weight,
    check_values,
    copy_weight,
    count_bytes,
    draw_matrices,
    draw_tokens,
    find_linear_tolerance,
    multiply,
)
from moesys.kernels import Kernel, linear

TORCH = "torch"


@dataclass(frozen=True)
class Linear:
    """One weight format, for several (columns, rows) of the matrix."""

    sizes: tuple[tuple[int, int], ...]
    form: Format
    systems: tuple[str, ...]
    kernel: str
    timing: Timing
    floor: float
    goal: float
    seed: int
    distinct_bytes: int = streams.DISTINCT_BYTES

    @property
    def name(self) -> str:
        return f"linear/{self.form}"

    def measure(self, system: str) -> dict[str, Any]:
        with torch.inference_mode():
            sweeps = {name_size(size): self._make_sweep(system, *size) for size in self.sizes}
            return streams.record_sweeps(sweeps, self.timing)

    def _make_sweep(self, system: str, num_columns: int, num_rows: int) -> tuple[int, Callable[[], None]]:
        product = find_product(system, self.kernel)
        weight = draw_matrices((num_rows, num_columns), self.form, torch.Generator().manual_seed(self.seed))
        num_copies = -(-self.distinct_bytes // count_bytes(weight))
        x_RK = draw_tokens(1, num_columns, self.seed)
        answer_RN = multiply(weight, x_RK.squeeze(0)).unsqueeze(0)
        if system == TORCH and isinstance(weight, Tensor):
            x_RK = x_RK.to(weight.dtype)
        check_values(product(x_RK, weight), answer_RN, find_linear_tolerance(self.form, x_RK.dtype))
        copies = [weight, *(copy_weight(weight) for _ in range(1, num_copies))]

        def sweep() -> None:
            for copy in copies:
                product(x_RK, copy)

        return num_copies * count_bytes(weight), sweep

    def deserves_pass(self, system: str, measured: Measured) -> bool:
        return True

    def make_claims(self, measured: Measured) -> list[Claim]:
        if self.form not in streams.CLAIMED_FORMATS or OURS not in self.systems:
            return []
        names = [name_size(size) for size in self.sizes]
        return [
            streams.claim_read_share(
                f"moe_layer/linear/{self.form}/{name}_of_read_rate", measured, name, self.floor, self.goal
            )
            for name in names
        ]

    def format(self, measured: Measured, gemm_flops: GemmFlops) -> str:
        return streams.format_sweeps(f"linear, {self.form} weights, 1 row", measured)

    def compute_shares(self, measured: Measured, gemm_flops: GemmFlops) -> dict[str, Spread]:
        return streams.compute_share_spreads(measured)


def name_size(size: tuple[int, int]) -> str:
    return f"{size[0]}->{size[1]}"


def find_product(system: str, kernel: str) -> Callable[[Tensor, Weight], Tensor]:
    """Returns what a system computes x @ weight^T with, for x (rows, columns) and weight (outputs, columns)."""
    if system == TORCH:
        return _multiply_in_torch
    return partial(linear, kernel=Kernel(kernel))


def _multiply_in_torch(x_RK: Tensor, weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor)
    return torch.nn.functional.linear(x_RK, weight)
