"""Sums of rows per token: values, the order of the sum, its rounding, and the same bits wherever the sum is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from expert_cases import FORMATS, MIXED, ROUTINGS, make_case, to_format
from torch import Tensor

from moesys.errors import KernelError, ShapeError
from moesys.kernels import (
    BankView,
    Kernel,
    Rows,
    TokenSum,
    compute_experts,
    compute_experts_summed,
    native,
    sum_rows,
    use_kernel,
)
from moesys.kernels.experts.row_sum import sum_rows_in_torch

COUNTS = [3, 0, 1, 8, 0, 2]
"""Rows per result."""


def draw(columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, TokenSum]:
    generator = torch.Generator().manual_seed(columns)
    num_rows = sum(COUNTS)
    y_AD = torch.randn(num_rows, columns, generator=generator).to(dtype)
    positions = torch.randperm(num_rows, generator=generator)
    offsets = torch.tensor([0, *COUNTS]).cumsum(0)
    return y_AD, torch.rand(num_rows, generator=generator), TokenSum(positions, offsets)


@pytest.fixture
def more_threads_than_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2 * (os.cpu_count() or 1))
    yield
    torch.set_num_threads(before)


def sum_in_loops(y_AD: Tensor, weights_A: Tensor, token_sum: TokenSum) -> Tensor:
    results = torch.zeros(token_sum.num_results, y_AD.shape[1], dtype=torch.float64)
    for result in range(token_sum.num_results):
        for position in token_sum.positions[token_sum.offsets[result] : token_sum.offsets[result + 1]]:
            results[result] += weights_A[position].double() * y_AD[position].double()
    return results


@pytest.mark.parametrize("columns", [1, 5, 16, 67, 1024, 2050, 5000])
def test_float32_sums_equal_the_float64_oracle(columns: int) -> None:
    y_AD, weights_A, token_sum = draw(columns)
    oracle = sum_in_loops(y_AD, weights_A, token_sum)
    found = sum_rows(y_AD, weights_A, token_sum, Kernel.NATIVE)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), oracle, rtol=0, atol=1e-6 * float(oracle.abs().max()))


@pytest.mark.parametrize("columns", [5, 1030])
def test_bfloat16_sums_are_rounded_once(columns: int) -> None:
    y_AD, weights_A, token_sum = draw(columns, torch.bfloat16)
    found = sum_rows(y_AD, weights_A, token_sum, Kernel.NATIVE)
    assert found.dtype is torch.bfloat16
    error = (found.double() - sum_in_loops(y_AD, weights_A, token_sum)).abs()
    assert bool((error <= 2**-8 * found.double().abs() + 1e-6).all())


def test_a_sum_is_made_in_the_order_that_is_listed() -> None:
    y_AD, weights_A = torch.tensor([[1e8], [1.0], [-1e8]]), torch.ones(3)
    orders = {(0, 2, 1): 1.0, (0, 1, 2): 0.0, (1, 2, 0): 0.0}
    for order, expected in orders.items():
        token_sum = TokenSum(torch.tensor(order), torch.tensor([0, 3]))
        assert sum_rows(y_AD, weights_A, token_sum, Kernel.NATIVE).item() == expected, order


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    """All halves of float32: subnormal and infinite ones, NaN, and sums that lie midway between two of bfloat16."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    y_AD = torch.stack([every, every.flip(0), every.roll(1)])
    token_sum = TokenSum(torch.tensor([0, 0, 1, 0, 2]), torch.tensor([0, 1, 3, 5]))
    found = sum_rows(y_AD, torch.ones(3), token_sum, Kernel.NATIVE)
    wide = y_AD.float()
    expected = torch.stack([wide[0], wide[0] + wide[1], wide[0] + wide[2]]).to(torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_nan_whatever_its_bits() -> None:
    """Rounding adds to the bits, and these would carry into the sign."""
    weight_A = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    token_sum = TokenSum(torch.tensor([0]), torch.tensor([0, 1]))
    assert sum_rows(torch.ones(1, 5).bfloat16(), weight_A, token_sum, Kernel.NATIVE).isnan().all()


def test_a_sum_waits_for_the_rows_of_all_threads(more_threads_than_cores: None) -> None:
    """One that is interrupted in the middle of its rows keeps the others waiting."""
    case = make_case([[0, 1, 2, 3]], 4, hidden=4096, inner=64).to(torch.float32)
    inside = [
        compute_experts_summed(case.rows, case.view, case.weights_A, case.token_sum, kernel=Kernel.NATIVE)
        for _ in range(100)
    ]
    y_AD = compute_experts(case.rows, case.view, kernel=Kernel.NATIVE)
    expected = sum_rows(y_AD, case.weights_A, case.token_sum, Kernel.NATIVE)
    assert all(torch.equal(found, expected) for found in inside)


def test_a_row_alone_has_the_bits_of_one_among_many() -> None:
    y_AD, weights_A, _ = draw(3000)
    alone = TokenSum(torch.tensor([4, 9, 2]), torch.tensor([0, 3]))
    many = TokenSum(alone.positions.repeat(40), torch.arange(0, 121, 3))
    among = sum_rows(y_AD, weights_A, many, Kernel.NATIVE)
    assert torch.equal(among, sum_rows(y_AD, weights_A, alone, Kernel.NATIVE).expand(40, -1))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", [*FORMATS, "bfloat16 rows"])
def test_the_sum_inside_the_kernel_has_the_bits_of_the_sum_behind_it(routing: str, form: str) -> None:
    """Also of several views, whose rows are added before they are summed."""
    case = make_case(*ROUTINGS[routing], hidden=70, inner=37).to(torch.float32)
    x_RD = case.x_RD.bfloat16() if form == "bfloat16 rows" else case.x_RD
    weight_form = "bfloat16" if form == "bfloat16 rows" else form
    gate_up, down = (to_format(weight, weight_form) for weight in (case.gate_up_SFD, case.down_SDF))
    view, rows = BankView(gate_up, down), Rows(x_RD, case.row_ids, case.offsets)
    inside = compute_experts_summed(rows, view, case.weights_A, case.token_sum, kernel=Kernel.NATIVE)
    assert inside.dtype is x_RD.dtype
    even = torch.arange(view.num_slots) % 2 == 0
    slots = torch.arange(view.num_slots)
    y_AD = sum(
        compute_experts(rows, replace(view, slot_of_expert=slots.where(held, -1)), kernel=Kernel.NATIVE)
        for held in (even, ~even)
    )
    assert isinstance(y_AD, Tensor)
    assert torch.equal(inside, sum_rows(y_AD, case.weights_A, case.token_sum, Kernel.NATIVE))


@pytest.mark.parametrize(
    ("positions", "offsets"),
    [([0, 15], [0, 2]), ([0, -1], [0, 2]), ([0, 1], [0, 1]), ([0, 1], [1, 2]), ([0, 1], [0, 3, 2])],
)
def test_indices_out_of_range_are_refused(positions: list[int], offsets: list[int]) -> None:
    y_AD, weights_A, _ = draw(6)
    wrong = TokenSum(torch.tensor(positions), torch.tensor(offsets))
    with pytest.raises(ShapeError, match=r"positions of a sum must be in 0\.\.13, and its offsets must rise"):
        sum_rows(y_AD, weights_A, wrong, Kernel.NATIVE)
    case = make_case(*MIXED).to(torch.float32)
    positions = [18 if place == 15 else place for place in positions]
    with pytest.raises(ShapeError, match=r"positions of a sum must be in 0\.\.17"):
        compute_experts_summed(
            Rows(case.x_RD, case.row_ids, case.offsets),
            BankView(case.gate_up_SFD, case.down_SDF),
            case.weights_A,
            TokenSum(torch.tensor(positions), torch.tensor(offsets)),
            kernel=Kernel.NATIVE,
        )


@pytest.mark.parametrize(
    "convert", [lambda ids: ids.int(), lambda ids: ids.to("meta")], ids=["int32", "meta"]
)
def test_indices_that_c_would_misread_are_not_its_call(convert: Callable[[Tensor], Tensor]) -> None:
    y_AD, weights_A, token_sum = draw(6)
    converted = TokenSum(convert(token_sum.positions), convert(token_sum.offsets))
    with pytest.raises(KernelError, match=r"it takes int64 positions and offsets on a CPU, got torch\.int"):
        sum_rows(y_AD, weights_A, converted, Kernel.NATIVE)
    with pytest.raises(ShapeError, match=r"reads torch\.int64 on a CPU here, got torch\.int"):
        native.sum_rows(y_AD, weights_A, converted)
    with pytest.raises(ShapeError, match=r"reads torch\.float32 on a CPU here, got torch\.float32 on meta"):
        native.sum_rows(y_AD, weights_A.to("meta"), token_sum)
    with pytest.raises(ShapeError, match=r"reads torch\.float32 on a CPU here, got torch\.float64"):
        native.sum_rows(y_AD.double(), weights_A, token_sum)


def test_torch_sums_by_indices_of_four_bytes() -> None:
    y_AD, weights_A, token_sum = draw(6)
    short = TokenSum(token_sum.positions.int(), token_sum.offsets.int())
    assert torch.equal(sum_rows(y_AD, weights_A, short), sum_rows_in_torch(y_AD, weights_A, token_sum))


def test_a_wrong_number_of_weights_is_refused() -> None:
    y_AD, weights_A, token_sum = draw(6)
    with pytest.raises(ShapeError, match=r"one weight per row \(14\)"):
        sum_rows(y_AD, weights_A[1:], token_sum, Kernel.NATIVE)


def test_torch_sums_where_a_gradient_is_needed() -> None:
    y_AD, weights_A, token_sum = draw(6)
    for watched in (y_AD, weights_A):
        watched.requires_grad_()
        sum_rows(y_AD, weights_A, token_sum).sum().backward()
        assert watched.grad is not None
        with pytest.raises(
            KernelError, match="kernel 'native' cannot compute row_sum: it computes no gradients"
        ):
            sum_rows(y_AD, weights_A, token_sum, Kernel.NATIVE)
        watched.requires_grad_(False)


def test_the_kernel_that_is_asked_for_sums() -> None:
    y_AD, weights_A, token_sum = draw(67, torch.bfloat16)
    by_torch = sum_rows_in_torch(y_AD, weights_A, token_sum)
    by_us = sum_rows(y_AD, weights_A, token_sum)
    assert not torch.equal(by_torch, by_us)
    assert torch.equal(sum_rows(y_AD, weights_A, token_sum, Kernel.TORCH), by_torch)
    with use_kernel(Kernel.TORCH):
        assert torch.equal(sum_rows(y_AD, weights_A, token_sum), by_torch)
