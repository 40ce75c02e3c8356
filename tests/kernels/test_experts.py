"""The expert operator: implementations against the float64 reference, with every gradient (law 1)."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from expert_cases import (
    FORMS,
    GRADIENTS,
    MIXED,
    ROUTINGS,
    TRAINABLE,
    Case,
    Choices,
    assert_numeric,
    compute,
    make_case,
    make_upstream,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.utils._python_dispatch import TorchDispatchMode

from moesys.kernels import BankView, Kernel, Rows, TokenSum, compute_experts, compute_experts_summed


@pytest.fixture(params=TRAINABLE, ids=str)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


def assert_equals_reference(case: Case, kernel: Kernel, *, summed: bool) -> None:
    oracle = run(case.to(torch.float64), Kernel.REFERENCE, summed=summed)
    actual = run(case, kernel, summed=summed)
    for name, expected in oracle.items():
        assert_numeric(actual[name], expected, name)


@pytest.mark.parametrize("summed", [False, True], ids=["rows", "summed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_reference(kernel: Kernel, routing: str, dtype: torch.dtype, summed: bool) -> None:
    choices, num_experts = ROUTINGS[routing]
    assert_equals_reference(make_case(choices, num_experts, dtype=dtype), kernel, summed=summed)


@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (33, 17), (64, 31)])
def test_equals_reference_in_odd_sizes(kernel: Kernel, hidden: int, inner: int) -> None:
    choices = [[t % 7, (t * 3 + 1) % 7] for t in range(29)]
    case = make_case(choices, 7, hidden=hidden, inner=inner, dtype=torch.float32)
    assert_equals_reference(case, kernel, summed=True)


@pytest.mark.parametrize("slots", [[2, 0, 3, 1], [5, -1, 0, -1], [-1, -1, -1, -1], [1, 1, 0, -1]], ids=str)
def test_slot_tables_equal_reference(kernel: Kernel, slots: list[int]) -> None:
    case = make_case(*MIXED)
    num_slots = 6 if 5 in slots else 4
    assert_equals_reference(case.with_slots(slots, num_slots), kernel, summed=False)


def test_rows_of_absent_experts_are_zero_and_unused_slots_get_no_gradient(kernel: Kernel) -> None:
    result = run(make_case(*MIXED).with_slots([3, -1, 0, -1], 5), kernel, summed=False)
    offsets = make_case(*MIXED).offsets.tolist()
    for expert, is_held in enumerate([True, False, True, False]):
        group = result["y"][offsets[expert] : offsets[expert + 1]]
        assert bool((group != 0).any()) is is_held
    assert not result["gate_up"][[1, 2, 4]].any()
    assert not result["down"][[1, 2, 4]].any()


def test_repeated_slots_add_their_gradients(kernel: Kernel) -> None:
    """Two experts that share a slot give the gradients of two equal experts, added."""
    case = make_case(*MIXED)
    case.gate_up_SFD[1], case.down_SDF[1] = case.gate_up_SFD[0], case.down_SDF[0]
    apart = run(case, kernel, summed=False)
    shared = run(case.with_slots([0, 0, 1, 2], 3), kernel, summed=False)
    assert torch.equal(shared["y"], apart["y"])
    for name in ("gate_up", "down"):
        assert_numeric(shared[name], torch.stack([apart[name][:2].sum(0), *apart[name][2:]]), name)


def test_partial_views_add_up_to_the_full_view_in_bits(kernel: Kernel) -> None:
    case = make_case(*MIXED, dtype=torch.float32)
    full = run(case, kernel, summed=False)
    partials = [
        run(case.with_slots(slots, 4), kernel, summed=False) for slots in ([1, -1, 0, -1], [-1, 3, -1, 0])
    ]
    assert torch.equal(partials[0]["y"] + partials[1]["y"], full["y"])
    assert torch.equal(partials[0]["weights"] + partials[1]["weights"], full["weights"])
    assert_numeric(partials[0]["x"] + partials[1]["x"], full["x"], "x")
    for name in ("gate_up", "down"):
        assert torch.equal(partials[0][name][[1, 0]], full[name][[0, 2]])
        assert torch.equal(partials[1][name][[3, 0]], full[name][[1, 3]])


def test_summed_equals_rows_summed_in_order_of_choice(kernel: Kernel) -> None:
    case = make_case([[3, 0, 2], [1], [], [2, 3]], 4)
    y_AD = run(case, kernel, summed=False)["y"]
    starts = case.token_sum.offsets.tolist()
    expected = [y_AD[case.token_sum.positions[a:b]].sum(0) for a, b in pairwise(starts)]
    assert_numeric(run(case, kernel, summed=True)["y"], torch.stack(expected), "y")


def test_rows_need_not_be_contiguous(kernel: Kernel) -> None:
    case = make_case(*MIXED)
    wide = torch.full((case.x_RD.shape[0], 2 * case.x_RD.shape[1]), torch.nan, dtype=torch.float64)
    wide[:, ::2] = case.x_RD
    strided = wide[:, ::2].requires_grad_()
    assert not strided.is_contiguous()
    y = compute_experts_summed(
        Rows(strided, case.row_ids, case.offsets), case.view, case.weights_A, case.token_sum, kernel=kernel
    )
    (grad_x,) = torch.autograd.grad(y, strided, make_upstream(y))
    expected = run(case, kernel, summed=True)
    assert_numeric(y.detach(), expected["y"], "y")
    assert_numeric(grad_x, expected["x"], "x")


def test_upstream_gradient_may_be_expanded(kernel: Kernel) -> None:
    """``y.sum().backward()`` hands over a gradient with strides of zero."""
    case = make_case(*MIXED)
    x = case.x_RD.clone().requires_grad_()
    expected = case.x_RD.clone().requires_grad_()
    for leaf, chosen in ((x, kernel), (expected, Kernel.REFERENCE)):
        rows = Rows(leaf, case.row_ids, case.offsets)
        compute_experts_summed(
            rows, case.view, case.weights_A, case.token_sum, kernel=chosen
        ).sum().backward()
    assert x.grad is not None
    assert expected.grad is not None
    assert_numeric(x.grad, expected.grad, "x")


@pytest.mark.parametrize("summed", [False, True], ids=["rows", "summed"])
@pytest.mark.parametrize("rank", [None, 2], ids=["", "adapters"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(kernel: Kernel, form: str, rank: int | None, summed: bool) -> None:
    routing = [[1, 0], [2], [1, 2]], 4
    case = make_case(*routing, hidden=2, inner=2, form=FORMS[form], bias=True, rank=rank)
    leaves = {name: leaf.requires_grad_() for name, leaf in case.list_leaves().items()}

    def compute_from(*tensors: Tensor) -> Tensor:
        return compute(case.with_leaves(dict(zip(leaves, tensors, strict=True))), kernel, summed=summed)

    assert torch.autograd.gradcheck(compute_from, tuple(leaves.values()))


def run_plain_bf16(case: Case) -> dict[str, Tensor]:
    """What one would write without this library: a loop over experts under autograd, all in bfloat16."""
    x, gate_up, down = (t.clone().requires_grad_() for t in (case.x_RD, case.gate_up_SFD, case.down_SDF))
    weights = case.weights_A.clone().requires_grad_()
    offsets = case.offsets.tolist()
    y = torch.zeros_like(x)
    for expert in range(len(offsets) - 1):
        span = slice(offsets[expert], offsets[expert + 1])
        gate, up = linear(x[case.row_ids[span]], gate_up[expert]).chunk(2, dim=-1)
        rows = linear(silu(gate) * up, down[expert]) * weights[span, None].to(x.dtype)
        y = y.index_add(0, case.row_ids[span], rows)
    (y * make_upstream(y)).sum().backward()
    named = {"x": x, "gate_up": gate_up, "down": down, "weights": weights}
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in named.items() if leaf.grad is not None}


def test_bf16_error_is_at_most_that_of_plain_bf16_times_1_5(kernel: Kernel) -> None:
    choices = [[(t * 5 + i * 2) % 6 for i in range(3)] for t in range(64)]
    case = make_case(choices, 6, hidden=64, inner=48, dtype=torch.bfloat16)
    oracle = run(case.to(torch.float64), Kernel.TORCH, summed=True)
    actual, plain = run(case, kernel, summed=True), run_plain_bf16(case)
    for name, expected in oracle.items():
        error, limit = (
            (actual[name].double() - expected).norm(),
            1.5 * (plain[name].double() - expected).norm(),
        )
        assert error <= limit, name


@st.composite
def ragged_choices(draw: st.DrawFn) -> tuple[Choices, int]:
    num_experts = draw(st.integers(1, 6))
    experts = st.lists(st.integers(0, num_experts - 1), max_size=num_experts, unique=True)
    return draw(st.lists(experts, max_size=7)), num_experts


@settings(max_examples=60, deadline=None)
@given(routing=ragged_choices())
def test_each_token_and_choice_contributes_exactly_once(routing: tuple[Choices, int]) -> None:
    """Against the dense formula: each expert computes each token, weighed by a (tokens, experts) matrix."""
    choices, num_experts = routing
    case = make_case(choices, num_experts)
    gates_TE = torch.zeros(len(choices), num_experts, dtype=torch.float64)
    flat = [(token, expert) for token, experts in enumerate(choices) for expert in experts]
    for (token, expert), position in zip(flat, case.token_sum.positions.tolist(), strict=True):
        gates_TE[token, expert] += case.weights_A[position]
    gate_TEF, up_TEF = torch.einsum("td,efd->tef", case.x_RD, case.gate_up_SFD).chunk(2, dim=-1)
    dense = torch.einsum("tef,edf,te->td", silu(gate_TEF) * up_TEF, case.down_SDF, gates_TE)
    assert_numeric(run(case, Kernel.TORCH, summed=True)["y"], dense + 0.0, "y")


def test_result_ids_invert_the_positions() -> None:
    """Poisoned memory: positions that are a permutation must overwrite every entry."""
    token_sum = TokenSum(positions=torch.tensor([3, 0, 2, 1]), offsets=torch.tensor([0, 1, 1, 4]))
    assert token_sum.num_results == 3
    assert token_sum.compute_result_ids(4).tolist() == [2, 2, 2, 0]


class _CountProducts(TorchDispatchMode):
    """How many matrix products are made."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "mm" in func.__name__
        return func(*args, **(kwargs or {}))


NEEDS = [needed for size in range(1, 5) for needed in combinations(GRADIENTS, size)]


@pytest.mark.parametrize("summed", [False, True], ids=["rows", "summed"])
@pytest.mark.parametrize("needed", NEEDS, ids=lambda needed: "+".join(needed))
def test_backward_makes_no_product_for_what_needs_no_gradient(needed: tuple[str, ...], summed: bool) -> None:
    """Per expert one product for each of x, gate_up and down; x and gate_up need one back through down too."""
    case = make_case(*MIXED)
    inputs = (case.x_RD, case.gate_up_SFD, case.down_SDF, case.weights_A)
    named = {n: t.clone().requires_grad_(n in needed) for n, t in zip(GRADIENTS, inputs, strict=True)}
    y = compute(case.with_leaves(named), Kernel.TORCH, summed=summed)
    with _CountProducts() as products:
        y.backward(make_upstream(y))
    assert products.count == 4 * (bool({"x", "gate_up"} & set(needed)) + len(set(needed) - {"weights"}))
    oracle = run(case, Kernel.REFERENCE, summed=summed)
    for name, leaf in named.items():
        if name in needed:
            assert leaf.grad is not None
            assert_numeric(leaf.grad, oracle[name], name)
        else:
            assert leaf.grad is None


class _Allocations(TorchDispatchMode):
    """The shapes of everything that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.shapes.append(tuple(result.shape))
        return result


def test_nothing_is_kept_for_backward_without_gradients() -> None:
    case = make_case(*MIXED)
    view = BankView(case.gate_up_SFD.requires_grad_(), case.down_SDF.requires_grad_())
    with torch.no_grad(), _Allocations() as allocations:
        compute_experts(case.rows, view, kernel=Kernel.TORCH)
    assert (case.rows.num_assignments, case.gate_up_SFD.shape[1]) not in allocations.shapes
