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
    run,
)
from torch import Tensor

from moesys.kernels import (
    Activation,
    ExpertForm,
    Int8Product,
    Int8Weight,
    Kernel,
    Rows,
    compute_experts,
    pack_int8,
)
from moesys.kernels.experts import reference
from moesys.kernels.experts.activations import activate
from moesys.kernels.formats import GROUP_SIZE, round_to_int8
from moesys.kernels.weight_product import multiply_weight

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
        hidden_AH = hidden_AH + case.gate_up_bias_SF[slot_of_assignment(case)]
    return hidden_AH, activate(hidden_AH, case.form)


def multiply_each(case: Case, weight_SMK: Tensor, x_AK: Tensor) -> Tensor:
    return torch.einsum("amk,ak->am", weight_SMK[slot_of_assignment(case)], x_AK)


def slot_of_assignment(case: Case) -> Tensor:
    return torch.tensor(case.view.compute_slots()).repeat_interleave(case.offsets.diff())


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
        behind_slots = case.with_slots(slots, 6)
        partial = compute(behind_slots, kernel, summed=False)
    held = slot_of_assignment(behind_slots) >= 0
    assert torch.equal(partial[held], full[held])
    assert not partial[~held].any()


@FORWARD_KERNELS
@ALL_FORMATS
def test_experts_may_share_a_slot(kernel: Kernel, weight_format: str) -> None:
    case = make_formatted(MIXED, "gelu", weight_format, bias=True)
    assert_forward_equals_reference(replace(case, slot_of_expert=torch.tensor([0, 0, 1, 0])), kernel)


@FORWARD_KERNELS
@ALL_FORMATS
def test_inputs_need_not_be_contiguous(kernel: Kernel, weight_format: str) -> None:
    case = make_formatted(MIXED, "swiglu", weight_format)
    strided = replace(
        case,
        x_RD=make_strided(case.x_RD),
        row_ids=torch.stack([case.row_ids, -case.row_ids], dim=1)[:, 0],
        offsets=torch.stack([case.offsets, -case.offsets], dim=1)[:, 0],
        weights_A=make_strided(case.weights_A),
    )
    assert not strided.x_RD.is_contiguous()
    assert_forward_equals_reference(strided, kernel)


@FORWARD_KERNELS
@ALL_FORMATS
def test_biases_need_not_be_contiguous(kernel: Kernel, weight_format: str) -> None:
    case = make_formatted(MIXED, "swiglu", weight_format, bias=True)
    biases = {name: make_strided(getattr(case, name)) for name in ("gate_up_bias_SF", "down_bias_SD")}
    assert_forward_equals_reference(replace(case, **biases), kernel)


@pytest.mark.parametrize("kernel", [*TRAINABLE, Kernel.AUTO], ids=str)
@pytest.mark.parametrize("product", Int8Product, ids=str)
def test_scales_need_not_be_contiguous(kernel: Kernel, product: Int8Product) -> None:
    case = make_formatted(MIXED, "swiglu", product)
    assert isinstance(case.gate_up_SFD, Int8Weight)
    assert isinstance(case.down_SDF, Int8Weight)
    strided = replace(
        case,
        gate_up_SFD=replace(case.gate_up_SFD, scales=make_strided(case.gate_up_SFD.scales)),
        down_SDF=replace(case.down_SDF, scales=make_strided(case.down_SDF.scales)),
    )
    assert_forward_equals_reference(strided, kernel)


@pytest.mark.parametrize("kernel", [*TRAINABLE, Kernel.AUTO], ids=str)
@ALL_FORMATS
def test_weights_need_not_be_contiguous(kernel: Kernel, weight_format: str) -> None:
    case = make_formatted(MIXED, "swiglu", weight_format)
    gate_up, down = make_strided_weight(case.gate_up_SFD), make_strided_weight(case.down_SDF)
    assert_forward_equals_reference(replace(case, gate_up_SFD=gate_up, down_SDF=down), kernel)


def make_strided(tensor: Tensor | None) -> Tensor:
    """The same numbers with a NaN between any two of them in memory."""
    assert tensor is not None
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def make_strided_weight(weight: Tensor | Int8Weight) -> Tensor | Int8Weight:
    if isinstance(weight, Tensor):
        return make_strided(weight)
    values = torch.stack([weight.values, ~weight.values], dim=-1)[..., 0]
    return replace(weight, values=values, scales=make_strided(weight.scales))


@FORWARD_KERNELS
@ALL_FORMS
@ALL_FORMATS
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_bad_row_is_its_own_problem(kernel: Kernel, form: str, weight_format: str, poison: float) -> None:
    """Row 1 holds NaN or Inf in one place: it gets no finite result but for what a limit saves; no other row
    notices."""
    case = make_formatted(MIXED, form, weight_format)
    x_RD = case.x_RD.clone()
    x_RD[1, 7] = poison
    is_bad = case.row_ids == 1
    with torch.no_grad():
        clean = [compute(case, kernel, summed=summed) for summed in (False, True)]
        rows, sums = (compute(replace(case, x_RD=x_RD), kernel, summed=summed) for summed in (False, True))
    assert torch.equal(rows[~is_bad], clean[0][~is_bad])
    assert torch.equal(sums[torch.arange(6) != 1], clean[1][torch.arange(6) != 1])
    if poison != poison:
        assert rows[is_bad].isnan().all()
        assert sums[1].isnan().all()


@TRAINABLE_KERNELS
@ALL_FORMS
@ALL_FORMATS
@pytest.mark.parametrize("rank", [None, 3], ids=["", "adapters"])
@pytest.mark.parametrize("routing", ["top_3_of_4", "empty_experts", "one_takes_all", "no_assignments"])
def test_gradients_equal_reference(
    kernel: Kernel, form: str, weight_format: str, rank: int | None, routing: str
) -> None:
    case = make_formatted(ROUTINGS[routing], form, weight_format, bias=True, rank=rank)
    oracle = run(case.to(torch.float64), Kernel.REFERENCE, summed=False)
    actual = run(case, kernel, summed=False)
    assert len(oracle) >= (5 if weight_format.startswith("w8") else 7)
    if rank is None:
        assert_results_equal(case, actual, oracle)
        return
    # The slack of w8a8 is derived for a bank without adapters.
    for name in oracle if not is_w8a8(case) else oracle.keys() - {"y", "weights"}:
        assert_numeric(actual[name], oracle[name], name)


@TRAINABLE_KERNELS
@ALL_FORMATS
def test_gradients_through_the_sum_equal_reference(kernel: Kernel, weight_format: str) -> None:
    case = make_formatted(ROUTINGS["ragged"], "clamped_swiglu", weight_format, bias=True)
    oracle = run(case.to(torch.float64), Kernel.REFERENCE, summed=True)
    actual = run(case, kernel, summed=True)
    for name in oracle if not is_w8a8(case) else oracle.keys() - {"y", "weights"}:
        assert_numeric(actual[name], oracle[name], name)


@TRAINABLE_KERNELS
@pytest.mark.parametrize(
    ("weight_format", "slots"), [("float32", [1, 3, 3, -1]), ("bfloat16", [1, 3, 0, -1])]
)
def test_gradients_behind_a_slot_table_equal_reference(
    kernel: Kernel, weight_format: str, slots: list[int]
) -> None:
    case = make_formatted(MIXED, "swiglu", weight_format, bias=True)
    case = replace(case, slot_of_expert=torch.tensor(slots))
    oracle = run(case.to(torch.float64), Kernel.REFERENCE, summed=False)
    actual = run(case, kernel, summed=False)
    for name, expected in oracle.items():
        assert_numeric(actual[name], expected, name)
    unused = [slot for slot in range(4) if slot not in slots]
    assert not any(actual[name][unused].any() for name in ("gate_up", "down", "gate_up_bias", "down_bias"))


@TRAINABLE_KERNELS
def test_experts_that_share_a_bf16_slot_add_their_gradients(kernel: Kernel) -> None:
    """Each term is rounded, and then their sum."""
    case = make_formatted(MIXED, "swiglu", "bfloat16")
    case = replace(case, slot_of_expert=torch.tensor([0, 0, 1, 2]))
    oracle = run(case.to(torch.float64), Kernel.REFERENCE, summed=False)
    actual = run(case, kernel, summed=False)
    for name in ("gate_up", "down"):
        error = (actual[name].double() - oracle[name]).norm()
        assert error <= 2 * 2**-8 * oracle[name].norm()


@TRAINABLE_KERNELS
@pytest.mark.parametrize("rank", [None, 3], ids=["", "adapters"])
def test_int8_weights_are_not_kept_widened_for_the_backward_pass(kernel: Kernel, rank: int | None) -> None:
    case = make_formatted(MIXED, "swiglu", "w8", rank=rank)
    case.x_RD.requires_grad_()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        compute(case, kernel, summed=False)
    assert saved
    assert (2 * INNER, HIDDEN) not in saved
    assert (HIDDEN, INNER) not in saved


LARGEST_SLOPE = {
    Activation.RELU: 1.0,
    Activation.GELU: 1.13,
    Activation.SWIGLU: 1.1,
    Activation.CLAMPED_SWIGLU: 1.1,
}
"""Of the activation, or of the gate in it: |gelu'| is at most 1.1290 and |silu'| at most 1.0999."""


@pytest.mark.parametrize("kernel", [*FORWARD, Kernel.REFERENCE], ids=str)
@ALL_FORMS
@pytest.mark.parametrize("product", Int8Product, ids=str)
@pytest.mark.parametrize("inner", [19, 130])
def test_int8_error_stays_within_its_bound(
    kernel: Kernel, form: str, product: Int8Product, inner: int
) -> None:
    """Against the unrounded weights. With s the scale of a number's group, rounding moves it by at most s / 2, so a
    product w x moves by at most |w'| s_x / 2 + |x| s_w / 2, and what reaches the activation grows by its slope."""
    exact = make_case(*MIXED, hidden=150, inner=inner, form=FORMS[form], bias=True).to(torch.float32)
    case = exact.with_format(product)
    exact = exact.to(torch.float64)
    rounds_activations = product is Int8Product.W8A8
    with torch.no_grad():
        oracle = compute_unweighted(exact, Kernel.REFERENCE)
        actual = compute_unweighted(case, kernel)

    x_AD = exact.x_RD[exact.row_ids]
    x_step_AD = expand_scales(round_to_int8(x_AD)[1], x_AD.shape[1]) * rounds_activations
    hidden_error_AH = bound_product(case, exact, "gate_up_SFD", x_AD, x_step_AD)
    hidden_AH, inner_AF = compute_inner(exact)
    inner_error_AF = bound_activation(exact.form, hidden_AH, hidden_error_AH)
    largest_AF = inner_AF.abs() + inner_error_AF
    inner_step_AF = expand_scales(round_to_int8(largest_AF)[1], inner) * rounds_activations
    y_error_AD = bound_product(case, exact, "down_SDF", inner_AF, inner_step_AF + 2 * inner_error_AF)

    float32_AD = 1e-5 * (oracle.abs().max() + y_error_AD)
    assert ((actual - oracle).abs() <= y_error_AD + float32_AD).all()
    assert (actual - oracle).abs().max() > y_error_AD.max() / 1000


def compute_unweighted(case: Case, kernel: Kernel) -> Tensor:
    return compute_experts(case.rows, case.view, kernel=kernel).double()


def bound_product(case: Case, exact: Case, bank: str, x_AK: Tensor, x_step_AK: Tensor) -> Tensor:
    """The error of a product whose right side is off by half of ``x_step`` and whose int8 weights by half a scale."""
    weight = getattr(case, bank)
    assert isinstance(weight, Int8Weight)
    weight_step_SMK = expand_scales(weight.scales, x_AK.shape[1])
    from_x = multiply_each(exact, weight.unpack(torch.float64).abs(), x_step_AK / 2)
    return from_x + multiply_each(exact, weight_step_SMK / 2, x_AK.abs())


def bound_activation(form: ExpertForm, hidden_AH: Tensor, error_AH: Tensor) -> Tensor:
    slope = LARGEST_SLOPE[form.activation]
    if not form.is_gated:
        return slope * error_AH
    gate_AF, up_AF = hidden_AH.chunk(2, dim=1)
    alpha = 1.0
    if form.activation is Activation.CLAMPED_SWIGLU:
        alpha = form.alpha
        gate_AF, up_AF = gate_AF.clamp(max=form.limit), up_AF.clamp(-form.limit, form.limit) + 1
    gate_error_AF, up_error_AF = error_AH.chunk(2, dim=1)
    gated_AF = gate_AF * torch.sigmoid(alpha * gate_AF)
    return slope * gate_error_AF * (up_AF.abs() + up_error_AF) + gated_AF.abs() * up_error_AF


@pytest.mark.parametrize("columns", [1, 64, 130])
def test_w8a8_sums_exact_integer_products(columns: int) -> None:
    """Numbers that are whole multiples of a power of two, with the largest 127 of them in each group, are not
    rounded at all: the product is exact."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (5, columns), generator=generator).float() for _ in range(2))
    x[:, ::GROUP_SIZE], weight[:, ::GROUP_SIZE] = 127, -127
    product = multiply_weight(x / 8, pack_int8(weight / 4, Int8Product.W8A8))
    assert torch.equal(product, x @ weight.T / 32)


def test_the_reference_is_row_invariant() -> None:
    assert reference.ROW_INVARIANT
    case = make_formatted(([[0, 1]] * 40, 2), "swiglu", "float32", hidden=37, inner=19)
    full = compute_experts(case.rows, case.view, kernel=Kernel.REFERENCE)
    for row in range(40):
        alone = Rows(case.x_RD[row : row + 1].clone(), torch.tensor([0, 0]), torch.tensor([0, 1, 2]))
        y = compute_experts(alone, case.view, kernel=Kernel.REFERENCE)
        assert torch.equal(y, full[[row, 40 + row]])
