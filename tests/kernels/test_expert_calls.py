"""Which calls of the expert operator are refused, in what words, and which implementation takes the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from expert_cases import FORMS, MIXED, Case, compute, make_case
from torch import nn

from moesys.errors import KernelError, ShapeError
from moesys.kernels import (
    Kernel,
    ModuleView,
    Rows,
    TokenSum,
    compute_experts,
    compute_experts_summed,
    pack_int8,
)
from moesys.kernels.choice import Obstacle
from moesys.kernels.experts import implementations, reference, torch_loop


def make_errors() -> dict[str, tuple[Case, str]]:
    case = make_case([[0, 1], [2]], 3)
    biased = make_case([[0, 1], [2]], 3, bias=True)
    adapted = make_case([[0, 1], [2]], 3, rank=2)
    gelu = make_case([[0, 1], [2]], 3, form=FORMS["gelu"])
    w8 = case.with_format("w8")
    assert adapted.adapters is not None
    return {
        "flat_x": (
            replace(case, x_RD=case.x_RD[0]),
            r"x must be \(rows, hidden\), got shape \(5,\); flatten",
        ),
        "integer_x": (replace(case, x_RD=case.x_RD.long()), r"floating point .*, got torch.int64; cast it"),
        "narrow_ids": (
            replace(case, row_ids=case.row_ids.int()),
            r"row_ids must be a flat list of int64, got torch.int32 of shape \(3,\)",
        ),
        "no_offsets": (
            replace(case, offsets=case.offsets[:0]),
            r"offsets must hold one entry more .*; begin it",
        ),
        "gate_up": (
            replace(case, gate_up_SFD=case.gate_up_SFD[:, :-1]),
            r"gate_up must be \(slots, 2 \* inner, hidden\) for swiglu = \(3, 6, 5\), got \(3, 5, 5\)",
        ),
        "gate_up_of_another_form": (
            replace(gelu, gate_up_SFD=case.gate_up_SFD),
            r"gate_up must be \(slots, inner, hidden\) for gelu = \(3, 3, 5\), got \(3, 6, 5\)",
        ),
        "down": (
            replace(case, down_SDF=case.down_SDF[:, :-1]),
            r"down must be .* = \(3, 5, 3\), got \(3, 4, 3\)",
        ),
        "too_few_slots": (
            replace(case, gate_up_SFD=case.gate_up_SFD[:2], down_SDF=case.down_SDF[:2]),
            r"must hold all 3 experts, it has 2 slots",
        ),
        "slot_table": (case.with_slots([0, 1], 3), r"one entry per expert \(3\), got shape \(2,\)"),
        "narrow_slot_table": (
            replace(case, slot_of_expert=torch.tensor([0, 1, 2], dtype=torch.int32)),
            r"slot_of_expert must be a flat list of int64, got torch.int32",
        ),
        "wider_weights": (
            replace(case, x_RD=case.x_RD.float()),
            r"x is torch.float32 but the experts are torch.float64, .*; cast x to torch.float64",
        ),
        "half_and_bfloat16": (
            replace(case.to(torch.bfloat16), x_RD=case.x_RD.half()),
            r"x is torch.float16 but the experts are torch.bfloat16, .*; cast x to torch.float32",
        ),
        "integer_weights": (
            replace(case, gate_up_SFD=case.gate_up_SFD.long(), down_SDF=case.down_SDF.long()),
            r"floats of 2 to 8 bytes or an Int8Weight, got torch.int64; .*pack_int8",
        ),
        "float8_weights": (
            replace(
                case,
                gate_up_SFD=case.gate_up_SFD.to(torch.float8_e4m3fn),
                down_SDF=case.down_SDF.to(torch.float8_e4m3fn),
            ),
            r"floats of 2 to 8 bytes or an Int8Weight, got torch.float8_e4m3fn",
        ),
        "mixed_dtypes": (
            replace(case, down_SDF=case.down_SDF.float()),
            r"gate_up and down must have the same format, got torch.float64 and torch.float32",
        ),
        "mixed_products": (
            replace(w8, down_SDF=case.with_format("w8a8").down_SDF),
            r"must have the same format, got int8 w8 and int8 w8a8; convert one",
        ),
        "int8_and_bfloat16": (
            replace(w8, x_RD=w8.x_RD.bfloat16()),
            r"int8 experts take activations of float32 .*, got torch.bfloat16; cast x to float32",
        ),
        "gate_up_bias": (
            replace(biased, gate_up_bias_SF=biased.down_bias_SD),
            r"gate_up_bias must be \(slots, 2 \* inner\) = \(3, 6\), got \(3, 5\)",
        ),
        "down_bias": (
            replace(biased, down_bias_SD=biased.gate_up_bias_SF),
            r"down_bias must be \(slots, hidden\) = \(3, 5\), got \(3, 6\)",
        ),
        "bias_dtype": (
            replace(biased, down_bias_SD=torch.zeros(3, 5)),
            r"down_bias must have the dtype of x \(torch.float64\), got torch.float32; cast",
        ),
        "adapter_shape": (
            replace(adapted, adapters=replace(adapted.adapters, down_b_EDR=torch.zeros(3, 5, 4).double())),
            r"adapters' down_b must be \(experts, hidden, rank\) = \(3, 5, 2\), got \(3, 5, 4\)",
        ),
        "adapter_dtype": (
            replace(adapted, adapters=replace(adapted.adapters, gate_up_a_ERD=torch.zeros(3, 2, 5))),
            r"adapters' gate_up_a must have the dtype of x \(torch.float64\), got torch.float32",
        ),
    }


def make_errors_of_sums() -> dict[str, tuple[Case, str]]:
    case = make_case([[0, 1], [2]], 3)
    positions, offsets = case.token_sum.positions, case.token_sum.offsets
    return {
        "weights": (replace(case, weights_A=case.weights_A[:-1]), r"per assignment \(3\), got shape \(2,\)"),
        "narrow_weights": (
            replace(case, weights_A=case.weights_A.bfloat16()),
            r"float32 or float64, got torch.bfloat16; route in float32",
        ),
        "positions": (
            replace(case, token_sum=TokenSum(positions.int(), offsets)),
            r"token_sum.positions must be a flat list of int64, got torch.int32",
        ),
        "offsets": (
            replace(case, token_sum=TokenSum(positions, offsets[:0])),
            r"token_sum.offsets must hold one entry more",
        ),
        "partial_view": (
            case.with_slots([0, 1, 2], 3),
            r"covers every expert; use compute_experts per view",
        ),
    }


@pytest.mark.parametrize("name", make_errors())
def test_a_refusal_tells_rule_and_values(name: str) -> None:
    case, message = make_errors()[name]
    for summed in (False, True):
        with pytest.raises(ShapeError, match=message):
            compute(case, Kernel.AUTO, summed=summed)


@pytest.mark.parametrize("name", make_errors_of_sums())
def test_a_refused_sum_tells_rule_and_values(name: str) -> None:
    case, message = make_errors_of_sums()[name]
    with pytest.raises(ShapeError, match=message):
        compute(case, Kernel.AUTO, summed=True)


def test_modules_have_no_matrices_for_adapters() -> None:
    case = make_case([[0]], 1, rank=2)
    with pytest.raises(
        ShapeError, match=r"adapters add to the matrices of a bank, and a ModuleView has none"
    ):
        compute_experts(case.rows, ModuleView([nn.Identity()]), case.adapters)


class ForwardOnly:
    """An implementation without a backward pass that answers in zeros and refuses what it is told to refuse."""

    ROW_INVARIANT = True
    HAS_BACKWARD = False

    def __init__(self, obstacle: str | None = None) -> None:
        self._obstacle = obstacle

    def find_obstacle(self, rows: Rows, *_: object) -> Obstacle | None:
        return None if self._obstacle is None else Obstacle(self._obstacle)

    def compute_experts(self, rows: Rows, *_: object) -> torch.Tensor:
        return rows.x_RD.new_zeros(rows.num_assignments, rows.x_RD.shape[1])

    def compute_experts_summed(self, rows: Rows, *_: object) -> torch.Tensor:
        return torch.zeros_like(rows.x_RD)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[ForwardOnly], None]:
    def put(fastest: ForwardOnly) -> None:
        table = {Kernel.NATIVE: fastest, Kernel.TORCH: torch_loop, Kernel.REFERENCE: reference}
        monkeypatch.setattr(implementations, "_IMPLEMENTATIONS", table)

    return put


LEAVES = list(make_case(*MIXED, bias=True, rank=2).list_leaves())


@pytest.mark.parametrize("watched", LEAVES)
def test_auto_takes_a_kernel_without_backward_only_where_no_gradient_is_needed(
    watched: str, install: Callable[[ForwardOnly], None]
) -> None:
    install(ForwardOnly())
    case = make_case(*MIXED, bias=True, rank=2)
    assert not compute(case, Kernel.AUTO, summed=True).any()
    case.list_leaves()[watched].requires_grad_()
    assert compute(case, Kernel.AUTO, summed=True).requires_grad
    with pytest.raises(
        KernelError, match=r"'native' cannot compute experts: .*gradients.*choose auto, torch"
    ):
        compute(case, Kernel.NATIVE, summed=True)
    with torch.no_grad():
        assert not compute(case, Kernel.AUTO, summed=True).any()


def test_auto_does_not_take_what_has_an_obstacle(install: Callable[[ForwardOnly], None]) -> None:
    install(ForwardOnly("it is Tuesday"))
    case = make_case(*MIXED)
    assert compute(case, Kernel.AUTO, summed=False).any()
    with pytest.raises(KernelError, match=r"'native' .*: it is Tuesday; choose auto, torch, reference"):
        compute(case, Kernel.NATIVE, summed=False)


def test_the_environment_decides_where_nothing_is_asked(
    monkeypatch: pytest.MonkeyPatch, install: Callable[[ForwardOnly], None]
) -> None:
    install(ForwardOnly())
    case = make_case(*MIXED)
    monkeypatch.setenv("MOESYS_KERNEL", "reference")
    assert torch.equal(
        compute(case, Kernel.AUTO, summed=False), compute(case, Kernel.REFERENCE, summed=False)
    )
    assert not compute(case, Kernel.NATIVE, summed=False).any()
    monkeypatch.setenv("MOESYS_KERNEL", "fast")
    with pytest.raises(KernelError, match=r"MOESYS_KERNEL is 'fast'; valid values are auto, reference"):
        compute(case, Kernel.AUTO, summed=False)


def test_int8_weights_of_a_gated_form_keep_their_halves_apart() -> None:
    """The halves of gate_up lie in its rows, so groups, which lie along columns, never mix gate and up."""
    case = make_case(*MIXED).to(torch.float32)
    assert isinstance(case.gate_up_SFD, torch.Tensor)
    gate, up = case.gate_up_SFD.chunk(2, dim=1)
    whole = pack_int8(case.gate_up_SFD)
    assert torch.equal(whole.scales, torch.cat([pack_int8(gate).scales, pack_int8(up).scales], dim=1))


def test_entry_points_take_adapters_before_the_kernel() -> None:
    case = make_case(*MIXED, rank=2)
    rows = compute_experts(case.rows, case.view, case.adapters, Kernel.TORCH)
    sums = compute_experts_summed(
        case.rows, case.view, case.weights_A, case.token_sum, case.adapters, Kernel.TORCH
    )
    assert rows.shape == (case.rows.num_assignments, 5)
    assert sums.shape == case.x_RD.shape
