"""Native experts with many rows copy their weights into panels first: every bit as with few rows, which do not."""

from __future__ import annotations

import pytest
import torch
from expert_cases import FORMS, to_format
from torch import Tensor

from moesys.kernels import BankView, Kernel, Rows, TokenSum, compute_experts, compute_experts_summed, sum_rows

FEW_ROWS = 95
"""The most for which no weight format makes panels."""
MANY_ROWS = 203
"""From 192 on all do; the last tile is not full."""
SIZES = {
    "whole panels": (96, 160),
    "units that end within a panel": (64, 70),
    "hidden columns that end within a panel": (71, 64),
    "long rows": (1056, 32),
}


def make_call(
    form: str, weight_format: str, dtype: torch.dtype, hidden: int, inner: int
) -> tuple[Rows, BankView]:
    generator = torch.Generator().manual_seed(hidden)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    halves = FORMS[form].num_halves
    view = BankView(
        to_format(draw(3, halves * inner, hidden), weight_format),
        to_format(draw(3, hidden, inner), weight_format),
        form=FORMS[form],
        gate_up_bias_SF=draw(3, halves * inner).to(dtype),
        down_bias_SD=draw(3, hidden).to(dtype),
    )
    offsets = torch.tensor([0, 1, 1 + MANY_ROWS, 1 + MANY_ROWS])
    row_ids = torch.randperm(MANY_ROWS + 1, generator=generator)
    return Rows(draw(MANY_ROWS + 1, hidden).to(dtype), row_ids, offsets), view


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("weight_format", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.float32), ("bfloat16", torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("form", FORMS)
def test_many_rows_have_the_bits_of_few(form: str, weight_format: str, dtype: torch.dtype, size: str) -> None:
    rows, view = make_call(form, weight_format, dtype, *SIZES[size])
    many = compute_experts(rows, view, kernel=Kernel.NATIVE)[1:]
    parts = [
        Rows(rows.x_RD, ids, torch.tensor([0, 0, len(ids), len(ids)]))
        for ids in rows.row_ids[1:].split(FEW_ROWS)
    ]
    few = [compute_experts(part, view, kernel=Kernel.NATIVE) for part in parts]
    assert torch.equal(many, torch.cat(few))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_many_rows_have_the_bits_of_stored_rows(dtype: torch.dtype) -> None:
    rows, view = make_call("swiglu", "bfloat16", dtype, 96, 160)
    num_rows = rows.num_assignments
    token_sum = TokenSum(torch.arange(num_rows).flip(0), torch.arange(0, num_rows + 1, 2))
    weights_A = torch.linspace(0.1, 1, num_rows)
    summed = compute_experts_summed(rows, view, weights_A, token_sum, kernel=Kernel.NATIVE)
    stored = compute_experts(rows, view, kernel=Kernel.NATIVE)
    assert torch.equal(summed, sum_rows(stored, weights_A, token_sum, kernel=Kernel.NATIVE))
