"""Experts as functions: adapters on a bank, and the user's own modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import (
    FORMS,
    GRADIENTS,
    MIXED,
    ROUTINGS,
    TRAINABLE,
    Case,
    assert_numeric,
    compute,
    make_case,
    make_upstream,
    run,
)
from torch import Tensor, nn

from moesys.errors import KernelError, ShapeError
from moesys.kernels import Kernel, ModuleView, compute_experts, compute_experts_summed

KERNELS = pytest.mark.parametrize("kernel", [*TRAINABLE, Kernel.REFERENCE], ids=str)


def merge_adapters(case: Case) -> Case:
    """The same experts with scale * b @ a added to their matrices."""
    adapters = case.adapters
    assert adapters is not None
    gate_up = case.gate_up_SFD + adapters.scale * adapters.gate_up_b_EFR @ adapters.gate_up_a_ERD
    down = case.down_SDF + adapters.scale * adapters.down_b_EDR @ adapters.down_a_ERF
    return replace(case, gate_up_SFD=gate_up, down_SDF=down, adapters=None)


@KERNELS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("routing", ["top_3_of_4", "empty_experts", "ragged", "no_tokens"])
def test_adapters_equal_merged_matrices(kernel: Kernel, form: str, routing: str) -> None:
    case = make_case(*ROUTINGS[routing], form=FORMS[form], bias=True, rank=2)
    adapted, merged = (run(c, kernel, summed=True) for c in (case, merge_adapters(case)))
    for name in ("y", *GRADIENTS, "gate_up_bias", "down_bias"):
        assert_numeric(adapted[name], merged[name], name)


@KERNELS
def test_adapter_gradients_follow_from_those_of_the_matrices(kernel: Kernel) -> None:
    """With W' = W + scale * b @ a: grad a = scale * b^T @ grad W', grad b = scale * grad W' @ a^T."""
    case = make_case(*ROUTINGS["empty_experts"], rank=2)
    adapters = case.adapters
    assert adapters is not None
    adapted, merged = (run(c, kernel, summed=True) for c in (case, merge_adapters(case)))
    for matrix, a, b in (
        ("gate_up", "gate_up_a_ERD", "gate_up_b_EFR"),
        ("down", "down_a_ERF", "down_b_EDR"),
    ):
        scaled = adapters.scale * merged[matrix]
        assert_numeric(adapted[a], getattr(adapters, b).mT @ scaled, a)
        assert_numeric(adapted[b], scaled @ getattr(adapters, a).mT, b)
        assert not adapted[a][[0, 2, 4, 5]].any()


@KERNELS
def test_adapters_go_by_expert_and_not_by_slot(kernel: Kernel) -> None:
    case = make_case(*MIXED, rank=2)
    moved = case.with_slots([2, -1, 0, 3], 4)
    expected, actual = (compute(c, kernel, summed=False) for c in (case, moved))
    absent = slice(int(case.offsets[1]), int(case.offsets[2]))
    assert not actual[absent].any()
    kept = torch.ones(expected.shape[0], dtype=torch.bool)
    kept[absent] = False
    assert_numeric(actual[kept], expected[kept], "y")


def test_a_frozen_bank_with_adapters_gets_no_gradient() -> None:
    case = make_case(*MIXED, rank=2)
    leaves = {n: t.requires_grad_(n not in GRADIENTS) for n, t in case.list_leaves().items()}
    compute(case.with_leaves(leaves), Kernel.TORCH, summed=True).sum().backward()
    assert all((leaf.grad is None) == (name in GRADIENTS) for name, leaf in leaves.items())


def test_bf16_adapters_keep_the_dtype_of_the_rows() -> None:
    case = make_case([[0, 1]] * 40, 2, rank=2).to(torch.bfloat16)
    y = compute(case, Kernel.TORCH, summed=True)
    oracle = compute(case.to(torch.float64), Kernel.REFERENCE, summed=True)
    assert y.dtype == torch.bfloat16
    assert (y.double() - oracle).norm() <= 0.02 * oracle.norm()


def test_the_native_kernel_refuses_adapters_and_auto_does_not() -> None:
    case = make_case(*MIXED, rank=2).to(torch.float32)
    with torch.no_grad():
        with pytest.raises(KernelError, match=r"kernel 'native' cannot compute experts: .*adapters"):
            compute(case, Kernel.NATIVE, summed=False)
        assert torch.equal(
            compute(case, Kernel.AUTO, summed=False), compute(case, Kernel.TORCH, summed=False)
        )


class SwiGLUExpert(nn.Module):
    """One expert of a case as a module that counts its calls."""

    def __init__(self, gate_up_FD: Tensor, down_DF: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up_FD.clone()), nn.Parameter(down_DF.clone())
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        gate, up = (x @ self.gate_up.T).chunk(2, dim=-1)
        return (nn.functional.silu(gate) * up) @ self.down.T


def make_modules(case: Case) -> list[SwiGLUExpert]:
    assert isinstance(case.gate_up_SFD, Tensor)
    assert isinstance(case.down_SDF, Tensor)
    return [
        SwiGLUExpert(gate_up, down) for gate_up, down in zip(case.gate_up_SFD, case.down_SDF, strict=True)
    ]


@KERNELS
@pytest.mark.parametrize("summed", [False, True], ids=["rows", "summed"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_modules_equal_the_bank_that_they_stand_for(kernel: Kernel, routing: str, summed: bool) -> None:
    case = make_case(*ROUTINGS[routing])
    modules = make_modules(case)
    view = ModuleView(modules)
    x, weights = (t.clone().requires_grad_() for t in (case.x_RD, case.weights_A))
    rows = replace(case.rows, x_RD=x)
    if summed:
        y = compute_experts_summed(rows, view, weights, case.token_sum, kernel=kernel)
    else:
        y = compute_experts(rows, view, kernel=kernel) * weights[:, None]
    oracle = run(case, Kernel.REFERENCE, summed=summed)
    assert_numeric(y, oracle["y"], "y")
    if case.rows.num_assignments == 0:
        return
    (y * make_upstream(y)).sum().backward()
    counts = case.offsets.diff().tolist()
    for expert, module in enumerate(modules):
        for name in ("gate_up", "down"):
            gradient = getattr(module, name).grad
            assert (gradient is None) is (counts[expert] == 0)
            if gradient is not None:
                assert_numeric(gradient, oracle[name][expert], name)
    assert x.grad is not None
    assert_numeric(x.grad, oracle["x"], "x")


@pytest.mark.parametrize("summed", [False, True], ids=["rows", "summed"])
@pytest.mark.parametrize("routing", ["no_assignments", "no_tokens"])
def test_gradients_without_assignments_are_zero_and_not_an_error(routing: str, summed: bool) -> None:
    case = make_case(*ROUTINGS[routing], rank=2)
    case.x_RD.requires_grad_()
    compute(case, Kernel.TORCH, summed=summed).sum().backward()
    assert case.x_RD.grad is not None
    assert not case.x_RD.grad.any()


def test_a_module_is_called_once_for_all_its_rows_and_not_without_rows() -> None:
    case = make_case(*ROUTINGS["empty_experts"])
    modules = make_modules(case)
    compute_experts(case.rows, ModuleView(modules), kernel=Kernel.TORCH)
    assert [module.num_calls for module in modules] == [0, 1, 0, 1, 0, 0]


@KERNELS
def test_modules_behind_a_slot_table(kernel: Kernel) -> None:
    case = make_case(*MIXED)
    modules = make_modules(case)
    view = ModuleView([modules[2], modules[0]], torch.tensor([1, -1, 0, -1]))
    y = compute_experts(case.rows, view, kernel=kernel)
    expected = compute_experts(case.rows, ModuleView(modules), kernel=kernel)
    experts = torch.arange(4).repeat_interleave(case.offsets.diff())
    is_held = (experts == 0) | (experts == 2)
    assert_numeric(y[is_held], expected[is_held], "y")
    assert not y[~is_held].any()


def test_a_module_of_the_wrong_width_is_named() -> None:
    case = make_case(*MIXED)
    functions = [nn.Identity(), nn.Identity(), nn.Linear(5, 7).double(), nn.Identity()]
    with pytest.raises(
        ShapeError, match=r"expert 2 returned \(\d+, 7\) for rows of \(\d+, 5\); an expert maps"
    ):
        compute_experts(case.rows, ModuleView(functions), kernel=Kernel.TORCH)


def test_a_module_may_return_another_dtype() -> None:
    case = make_case(*MIXED)
    y = compute_experts(case.rows, ModuleView([lambda x: x.float()] * 4))
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, case.x_RD[case.row_ids], rtol=1e-6, atol=1e-6)
