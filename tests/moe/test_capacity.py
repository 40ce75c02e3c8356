"""Capacity: both formulas, who is dropped, what becomes of weights, and options that contradict dropless."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from fake_seams import make_routing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesys.errors import RoutingError
from moesys.moe import Capacity, CapacityFormula, DropBy, Routing, compute_positions

NUM_EXPERTS = 4


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Fixed k, distinct experts per token, scores with many ties, best first."""
    k = draw(st.integers(1, NUM_EXPERTS))
    quarters = st.lists(st.sampled_from([1, 2, 3]), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS)
    scores = torch.tensor(draw(st.lists(quarters, max_size=8)), dtype=torch.float64).view(-1, NUM_EXPERTS)
    scores = scores / scores.sum(1, keepdim=True)
    choices = [sorted(range(NUM_EXPERTS), key=lambda e: (-row[e], e))[:k] for row in scores.tolist()]
    weights = [row[e] for row, experts in zip(scores.tolist(), choices, strict=True) for e in experts]
    routing = make_routing(choices, NUM_EXPERTS, weights=weights, fixed_k=k, scores_TE=scores)
    return dataclasses.replace(routing, weights=torch.tensor(weights, dtype=torch.float64))


def list_assignments(routing: Routing) -> list[tuple[int, int, int]]:
    """(token, rank of the choice, expert) of each assignment."""
    tokens, ranks = routing.compute_token_ids().tolist(), routing.choice.compute_ranks().tolist()
    return list(zip(tokens, ranks, routing.expert_ids.tolist(), strict=True))


def order_slowly(routing: Routing, drop_by: DropBy) -> list[int]:
    """Places of the assignments in the order in which experts take them."""
    assignments = list_assignments(routing)
    scores = [] if routing.scores_TE is None else routing.scores_TE.tolist()

    def key(place: int) -> tuple[float, ...]:
        token, rank, expert = assignments[place]
        match drop_by:
            case DropBy.POSITION:
                return (rank, token)
            case DropBy.CONFIDENCE:
                return (rank, -max(scores[token]), token)
            case DropBy.PROBABILITY:
                return (-scores[token][expert], token)

    return sorted(range(len(assignments)), key=key)


@pytest.mark.parametrize("drop_by", list(DropBy))
@settings(max_examples=60, deadline=None)
@given(routing=routings())
def test_positions_equal_slow_loop_and_are_unique_per_expert(drop_by: DropBy, routing: Routing) -> None:
    taken: Counter[int] = Counter()
    expected = [0] * routing.num_assignments
    for place in order_slowly(routing, drop_by):
        expert = routing.expert_ids.tolist()[place]
        expected[place] = taken[expert]
        taken[expert] += 1
    assert compute_positions(routing, drop_by).tolist() == expected
    for expert, count in taken.items():
        own = [p for p, e in zip(expected, routing.expert_ids.tolist(), strict=True) if e == expert]
        assert sorted(own) == list(range(count))


@pytest.mark.parametrize("drop_by", list(DropBy))
@settings(max_examples=60, deadline=None)
@given(
    routing=routings(), factor=st.sampled_from([0.3, 0.5, 1.0, 1.7]), formula=st.sampled_from(CapacityFormula)
)
def test_capacity_is_respected_and_filled(
    drop_by: DropBy, formula: CapacityFormula, factor: float, routing: Routing
) -> None:
    capacity = Capacity.by_formula(formula, factor, min_capacity=1, drop_by=drop_by)
    dropped = capacity.find_dropped(routing)
    assert dropped is not None
    limit = capacity.compute_limit(routing)
    needs = Counter(routing.expert_ids.tolist())
    kept = Counter(routing.expert_ids[~dropped].tolist())
    assert {e: kept[e] for e in needs} == {e: min(n, limit) for e, n in needs.items()}
    marked = capacity.mark(routing, dropped, is_normalized=True)
    assert marked.count_dropped() == sum(needs.values()) - sum(kept.values())


def test_all_first_choices_come_before_any_second_choice() -> None:
    routing = make_routing([[1, 0], [0, 1], [0, 2]], 3, fixed_k=2)
    # Expert 0: tokens 1 and 2 first, then token 0's second choice.
    assert compute_positions(routing).tolist() == [0, 2, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "factor", "tutel", "deepspeed"),
    [
        (1000, 64, 2, 1.25, 40, 40),
        (100, 8, 2, 1.2, 30, 30),
        (130, 64, 2, 1.0, 6, 5),
        (10, 8, 1, 0.3, 0, 1),
        # In float64 DeepSpeed's would be 111, in its own float32 31, and Tutel's 28.
        (800, 8, 1, 1.1, 110, 110),
        (50, 2, 1, 1.2, 30, 30),
        (800, 8, 1, 0.29, 29, 29),
    ],
)
def test_formulas(
    num_tokens: int, num_experts: int, k: int, factor: float, tutel: int, deepspeed: int
) -> None:
    arguments = (num_tokens, num_experts, k, factor)
    assert CapacityFormula.TUTEL.compute(*arguments) == tutel
    assert CapacityFormula.DEEPSPEED.compute(*arguments) == deepspeed


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 4096), st.integers(1, 64), st.integers(1, 8), st.integers(1, 500))
def test_formulas_are_exact(num_tokens: int, num_experts: int, k: int, hundredths: int) -> None:
    """Against integers only."""
    arguments = (num_tokens, num_experts, k, hundredths / 100)
    even_share = -(-num_tokens // num_experts)
    assert CapacityFormula.TUTEL.compute(*arguments) == k * (hundredths * even_share // 100)
    product = num_tokens * hundredths * k
    assert CapacityFormula.DEEPSPEED.compute(*arguments) == -(-product // (num_experts * 100))


@pytest.mark.parametrize("formula", CapacityFormula)
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3, 1.34, 2.0, 2.7, 3.0, 4.0, 4.5, 8.0])
@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (8, 3), (6, 2), (3, 3), (1, 1)])
def test_a_factor_can_drop_where_some_number_of_tokens_exceeds_its_limit(
    num_experts: int, k: int, factor: float, formula: CapacityFormula
) -> None:
    limits = {t: formula.compute(t, num_experts, k, factor) for t in range(1, 200)}
    can_drop = any(limit < num_tokens for num_tokens, limit in limits.items())
    assert formula.can_drop(num_experts, k, factor) == can_drop


def test_minimum_and_number_of_tokens_bound_the_limit() -> None:
    routing = make_routing([[0]] * 10, 8, fixed_k=1)
    assert Capacity.tutel(0.3).compute_limit(routing) == 0
    assert Capacity.tutel(0.3, min_capacity=3).compute_limit(routing) == 3
    assert Capacity.deepspeed(0.3).compute_limit(routing) == 4
    assert Capacity.deepspeed(0.3, min_capacity=40).compute_limit(routing) == 10
    assert Capacity.deepspeed(1000.0).compute_limit(routing) == 10


def test_tutels_factors() -> None:
    """Two experts: seven assignments and one; the even share of four."""
    routing = make_routing([[0]] * 7 + [[1]], 2, fixed_k=1)
    limits = {f: Capacity.from_tutel_factor(f).compute_limit(routing) for f in (1.0, 0.0, -1.0, -5.0, 2.0)}
    assert limits == {1.0: 4, 0.0: 7, -1.0: 4, -5.0: 7, 2.0: 8}
    drops = {}
    for factor in limits:
        dropped = Capacity.from_tutel_factor(factor).find_dropped(routing)
        drops[factor] = 0 if dropped is None else int(dropped.sum())
    assert drops == {1.0: 3, 0.0: 0, -1.0: 3, -5.0: 0, 2.0: 0}
    assert Capacity.from_tutel_factor(0.0) == Capacity.unbounded()
    assert Capacity.from_tutel_factor(-0.5, min_capacity=3).compute_limit(routing) == 3
    assert Capacity.from_tutel_factor(-0.5, min_capacity=30).compute_limit(routing) == 7


def test_the_formula_brings_its_own_factors_and_minimum() -> None:
    tutel, deepspeed = CapacityFormula.TUTEL, CapacityFormula.DEEPSPEED
    for factor in (1.5, 0.0, -1.5):
        assert Capacity.by_formula(tutel, factor) == Capacity.from_tutel_factor(factor)
    assert Capacity.by_formula(tutel, -1.5, min_capacity=2) == Capacity.from_tutel_factor(
        -1.5, min_capacity=2
    )
    assert (
        Capacity.by_formula(deepspeed, 1.5)
        == Capacity.deepspeed(1.5)
        == Capacity.deepspeed(1.5, min_capacity=4)
    )
    assert Capacity.by_formula(deepspeed, 1.5, min_capacity=0) == Capacity.deepspeed(1.5, min_capacity=0)
    for factor in (0.0, -1.5):
        with pytest.raises(RoutingError, match=r"must be positive; .*from_tutel_factor"):
            Capacity.by_formula(deepspeed, factor)


def make_weighted(weights: Tensor) -> Routing:
    return Routing(
        torch.tensor([0, 1, 0, 2, 0, 3]), weights, torch.tensor([0, 2, 4, 6]), NUM_EXPERTS, fixed_k=2
    )


WEIGHTS = torch.tensor([0.75, 0.25, 0.6, 0.4, 0.5, 0.5], dtype=torch.float64)


def test_tutel_leaves_the_weights_of_survivors_and_deepspeed_normalises_them_again() -> None:
    routing = make_weighted(WEIGHTS)
    tutel, deepspeed = Capacity.tutel(0.5), Capacity.deepspeed(0.3, min_capacity=0)
    assert tutel.compute_limit(routing) == 0
    assert deepspeed.compute_limit(routing) == 1
    dropped = torch.tensor([False, False, True, False, True, False])
    assert deepspeed.find_dropped(routing).tolist() == dropped.tolist()
    assert tutel.mark(routing, dropped, is_normalized=True).weights is routing.weights
    kept = deepspeed.mark(routing, dropped, is_normalized=True).weights[~dropped]
    torch.testing.assert_close(kept, torch.tensor([0.75, 0.25, 1.0, 1.0], dtype=torch.float64))


def test_weights_that_were_never_normalised_stay() -> None:
    routing = make_weighted(0.5 * WEIGHTS)
    marked = Capacity.deepspeed(1.0).mark(routing, torch.tensor([True, False] * 3), is_normalized=False)
    assert marked.weights is routing.weights


@pytest.mark.parametrize("remainder", [0.0, 1e-30, 1e-12, 1e-9])
def test_survivors_of_about_no_weight_keep_finite_weights_and_gradients(remainder: float) -> None:
    weights = torch.tensor([1.0, remainder], requires_grad=True)
    routing = Routing(torch.tensor([0, 1]), weights, torch.tensor([0, 2]), 2, fixed_k=2)
    kept = Capacity.deepspeed(1.0).mark(routing, torch.tensor([True, False]), is_normalized=True).weights[1]
    kept.backward()
    assert 0 <= kept.item() < 0.01
    assert weights.grad is not None
    assert weights.grad.isfinite().all()


def test_renormalised_weights_keep_a_scaled_total_and_their_gradient() -> None:
    dropped = torch.tensor([False, False, True, False, True, True])
    capacity = Capacity.deepspeed(1.0)

    def weigh(weights: Tensor) -> Tensor:
        return capacity.mark(make_weighted(weights), dropped, is_normalized=True).weights[~dropped]

    kept = weigh(2.5 * WEIGHTS)
    torch.testing.assert_close(kept, 2.5 * torch.tensor([0.75, 0.25, 1.0], dtype=torch.float64))
    assert torch.autograd.gradcheck(weigh, WEIGHTS.clone().requires_grad_())


def test_a_single_choice_is_never_normalised_again() -> None:
    routing = make_routing([[0], [0]], 2, weights=[0.5, 0.25], fixed_k=1)
    capacity = Capacity.deepspeed(0.5, min_capacity=0)
    marked = capacity.mark(routing, capacity.find_dropped(routing), is_normalized=True)
    assert marked.dropped.tolist() == [False, True]
    assert marked.weights[0] == 0.5


def test_the_routing_stays_complete() -> None:
    routing = make_weighted(WEIGHTS)
    marked = Capacity.deepspeed(1.0).mark(routing, torch.tensor([True] * 6), is_normalized=True)
    assert marked.expert_ids is routing.expert_ids
    assert marked.num_assignments == 6
    assert marked.weights.isfinite().all()
    assert Capacity.unbounded().mark(routing, None, is_normalized=True) is routing


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Capacity(None, min_capacity=4), r"without a factor drops nothing, so min_capacity \(4\)"),
        (lambda: Capacity(None, drop_by=DropBy.CONFIDENCE), r"drop_by \(confidence\).* contradict"),
        (lambda: Capacity(None, bound_by_need=True), r"bound_by_need \(True\) contradict"),
        (
            lambda: Capacity.from_tutel_factor(0, drop_by=DropBy.CONFIDENCE),
            r"drops nothing, so .*drop_by \(confidence\)",
        ),
        (lambda: Capacity.from_tutel_factor(0, min_capacity=2), r"drops nothing, so min_capacity \(2\)"),
        (
            lambda: Capacity.deepspeed(2.0).require_effect(4, 2),
            r"factor \(2.0\) can never drop anything: with 4 experts and top_k 2 .* a factor below 2, or no",
        ),
        (lambda: Capacity.from_tutel_factor(-4.0).require_effect(4, 1), r"factor \(4.0\) can never drop"),
        (lambda: Capacity(0.0), r"factor \(0.0\) must be positive; use Capacity.unbounded\(\)"),
        (lambda: Capacity.tutel(-1.0), r"factor \(-1.0\) must be positive; .*from_tutel_factor"),
        (lambda: Capacity(float("nan")), r"factor \(nan\) must be positive"),
        (lambda: Capacity(1.0, min_capacity=-1), r"min_capacity \(-1\) must be at least 0"),
    ],
)
def test_options_that_contradict_each_other(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        make()


def test_a_factor_just_below_the_number_that_takes_all_has_an_effect() -> None:
    Capacity.deepspeed(1.99).require_effect(4, 2)
    Capacity.unbounded().require_effect(4, 2)


def test_a_ragged_routing_has_no_capacity_factor() -> None:
    ragged = make_routing([[0], [0, 1]], 2)
    with pytest.raises(RoutingError, match="needs the same number of experts for every token"):
        Capacity.deepspeed(1.0).find_dropped(ragged)
    assert Capacity.unbounded().compute_limit(ragged) == 2


@pytest.mark.parametrize("drop_by", [DropBy.PROBABILITY, DropBy.CONFIDENCE])
def test_dropping_by_scores_needs_scores(drop_by: DropBy) -> None:
    with pytest.raises(RoutingError, match=f"dropping by {drop_by} needs a Routing with scores_TE"):
        compute_positions(make_routing([[0]], 1, fixed_k=1), drop_by)
