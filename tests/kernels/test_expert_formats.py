"""The expert operator in every form and weight format against the float64 reference (law 1)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from expert_cases import (
    FORMATS,
    FORMS,
    FORWARD,
    MIXED,
    ROUTINGS,
    TRAINABLE,
    Case,
    Choices,
    assert_numeric,
    compute,
    make_case,
)
from torch import Tensor

from moesys.kernels import Int8Product, Int8Weight, Kernel
from moesys.kernels.experts.activations import activate
from moesys.kernels.formats import GROUP_SIZE, round_to_int8

HIDDEN, INNER = 37, 19
FORWARD_KERNELS = pytest.mark.parametrize("kernel", FORWARD, ids=str)
TRAINABLE_KERNELS = pytest.mark.parametrize("kernel", TRAINABLE, ids=str)
ALL_FORMS = pytest.mark.parametrize("form", FORMS)
ALL_FORMATS = pytest.mark.parametrize("weight_format", FORMATS)


def make_formatted(
    routing: tuple[Choices, int],
    form: str,
    weight_format: str,
    *,
    hidden: int = HIDDEN,
    inner: int = INNER,
    bias: bool = False,
    rank: int | None = None,
) -> Case:
    case = make_case(*routing, hidden=hidden, inner=inner, form=FORMS[form], bias=bias, rank=rank)
    return case.with_format(weight_format)


def assert_results_equal(case: Case, actual: dict[str, Tensor], oracle: dict[str, Tensor]) -> None:
    """Results and gradients, rows not summed. With w8a8 the rows have a bound of their own, and so has what is
    multiplied by them, the gradient of the routing weights."""
    for name, expected in oracle.items():
        if is_w8a8(case) and name in ("y", "weights"):
            continue
        assert_numeric(actual[name], expected, name)
    if is_w8a8(case):
        assert_rows_equal_but_for_ties(case, actual["y"], oracle["y"])


def assert_rows_equal_but_for_ties(case: Case, actual: Tensor, oracle: Tensor) -> None:
    """Where last bits differ before the inner activations are rounded, one near a tie moves by its scale, and y by
    |down| times that. Few rows have such a tie; the others are equal as always."""
    if oracle.shape[0] == 0:
        return
    assert isinstance(case.down_SDF, Int8Weight)
    _, inner_AF = compute_inner(case)
    steps_AF = expand_scales(round_to_int8(inner_AF)[1], inner_AF.shape[1])
    slack_AD = multiply_each(case, case.down_SDF.unpack(torch.float64).abs(), steps_AF)
    slack_AD *= case.weights_A.double().abs()[:, None]
    difference_AD = (actual.double() - oracle).abs()
    tolerance = 1e-5 * oracle.abs().max()
    assert (difference_AD <= 1.001 * slack_AD + tolerance).all()
    assert (difference_AD <= tolerance).all(dim=1).double().mean() >= 0.75


def compute_inner(case: Case) -> tuple[Tensor, Tensor]:
    """(assignments, halves * inner) and (assignments, inner) float64: before and after the activation, with weights
    and activations as the format rounds them."""
    case = case.to(torch.float64)
    x_AD = case.x_RD[case.row_ids]
    if is_w8a8(case):
        values, scales = round_to_int8(x_AD)
        x_AD = values[:, : x_AD.shape[1]] * expand_scales(scales, x_AD.shape[1])
    hidden_AH = multiply_each(case, widen(case.gate_up_SFD), x_AD)
    if case.gate_up_bias_SF is not None:
        hidden_AH = hidden_AH + case.gate_up_bias_SF[expert_of_assignment(case)]
    return hidden_AH, activate(hidden_AH, case.form)


def multiply_each(case: Case, weight_SMK: Tensor, x_AK: Tensor) -> Tensor:
    return torch.einsum("amk,ak->am", weight_SMK[expert_of_assignment(case)], x_AK)


def expert_of_assignment(case: Case) -> Tensor:
    return torch.arange(case.offsets.shape[0] - 1).repeat_interleave(case.offsets.diff())


def expand_scales(scales: Tensor, num_columns: int) -> Tensor:
    return scales.double().repeat_interleave(GROUP_SIZE, dim=-1)[..., :num_columns]


def widen(weight: Tensor | Int8Weight) -> Tensor:
    return weight.unpack(torch.float64) if isinstance(weight, Int8Weight) else weight.double()


def is_w8a8(case: Case) -> bool:
    return isinstance(case.gate_up_SFD, Int8Weight) and case.gate_up_SFD.product is Int8Product.W8A8


def assert_forward_equals_reference(case: Case, kernel: Kernel) -> None:
    with torch.no_grad():
        oracle = compute(case.to(torch.float64), Kernel.REFERENCE, summed=False)
        rows = compute(case, kernel, summed=False)
        assert_results_equal(case, {"y": rows}, {"y": oracle})
        if case.slot_of_expert is None:
            starts, positions = case.token_sum.offsets.tolist(), case.token_sum.positions
            sums = [rows[positions[a:b]].double().sum(0) for a, b in pairwise(starts)]
            expected = torch.stack(sums) if sums else rows.new_zeros(0, rows.shape[1])
            assert_numeric(compute(case, kernel, summed=True), expected, "sum")


@FORWARD_KERNELS
@ALL_FORMS
@ALL_FORMATS
@pytest.mark.parametrize("routing", ROUTINGS)
def test_forward_equals_reference(kernel: Kernel, form: str, weight_format: str, routing: str) -> None:
    case = make_formatted(ROUTINGS[routing], form, weight_format)
    assert case.x_RD.dtype == torch.float32
    assert_forward_equals_reference(case, kernel)


@FORWARD_KERNELS
@ALL_FORMS
@ALL_FORMATS
def test_biases_equal_reference(kernel: Kernel, form: str, weight_format: str) -> None:
    case = make_formatted(MIXED, form, weight_format, bias=True)
    assert_forward_equals_reference(case, kernel)


@FORWARD_KERNELS
@ALL_FORMATS
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (64, 64), (65, 129), (130, 70)])
def test_sizes_around_a_group_equal_reference(
    kernel: Kernel, weight_format: str, hidden: int, inner: int
) -> None:
    routing = [[t % 7, (t * 3 + 1) % 7] for t in range(9)], 7
    assert_forward_equals_reference(
        make_formatted(routing, "swiglu", weight_format, hidden=hidden, inner=inner), kernel
    )


@FORWARD_KERNELS
@ALL_FORMATS
@pytest.mark.parametrize("slots", [[2, 0, 3, 1], [5, -1, 0, -1], [-1, -1, -1, -1]], ids=str)
def test_slot_tables_equal_reference(kernel: Kernel, weight_format: str, slots: list[int]) -> None:
    case = make_formatted(MIXED, "swiglu", weight_format, bias=True)
    with torch.no_grad():
        full = compute(case, kernel, summed=False)
        partial = compute(case.with_slots(slots, 6), kernel, summed=False)
    held = (torch.tensor(slots) >= 0)[expert_of_assignment(case)]
    assert torch.equal(partial[held], full[held])
    assert not partial[~held].any()


@FORWARD_KERNELS
@ALL_FORMATS
def test_experts_may_share_a_slot(kernel: Kernel, weight_format: str) -> None:
    case = make_formatted(MIXED, "gelu", weight_format, bias=True)
    with torch.no_grad():
        assert_results_equal(
            replace(case, slot_of_expert=None),
            {"y": compute(share_first_slot(case), kernel, summed=False)[: int(case.offsets[1])]},
            {"y": compute(case.to(torch.float64), Kernel.REFERENCE, summed=False)[: int(case.offsets[1])]},
        ) if not is_w8a8(case) else None
        shared = share_first_slot(case)
        oracle = compute(shared.to(torch.float64), Kernel.REFERENCE, summed=False)
        actual = compute(shared, kernel, summed=False)
    error = (actual - oracle).abs().amax(dim=1)
    assert (error <= 1e-5 * oracle.abs().max()).double().mean() >= 0.75


def share_first_slot(case: Case) -> Case:
    return replace(case, slot_of_expert=torch.tensor([0, 0, 1, 0]))
