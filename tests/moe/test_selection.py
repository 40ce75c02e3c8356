"""Selections against slow loops in plain Python: every rule, ties, and choices that must be impossible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesys.errors import RoutingError
from moesys.moe import Choice, GroupLimitedTopK, GroupScore, Selection, Threshold, TopK

Row = list[float]
# A few values only, so that ties are common.
SCORES = st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0])


@st.composite
def tables(draw: st.DrawFn, num_experts: int = 6) -> Tensor:
    num_tokens = draw(st.integers(0, 5))
    row = st.lists(SCORES, min_size=num_experts, max_size=num_experts)
    rows = draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    return torch.tensor(rows, dtype=torch.float32).view(num_tokens, num_experts)


def split(choice: Choice) -> list[list[int]]:
    return [ids.tolist() for ids in choice.expert_ids.tensor_split(choice.token_offsets[1:-1])][
        : choice.num_tokens
    ]


def rank(row: Row) -> list[int]:
    return sorted(range(len(row)), key=lambda e: (-row[e], e))


def choose_best(row: Row, k: int) -> list[int]:
    return rank(row)[:k]


def choose_in_groups(row: Row, k: int, num_groups: int, top_groups: int, num_counted: int = 2) -> list[int]:
    size = len(row) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    totals = [sum(sorted((row[e] for e in group), reverse=True)[:num_counted]) for group in groups]
    open_experts = [e for g in choose_best(totals, top_groups) for e in groups[g]]
    return sorted(open_experts, key=lambda e: (-row[e], e))[:k]


def choose_passing(row: Row, k: int, min_score: float) -> list[int]:
    best, *others = rank(row)[:k]
    return [best, *(e for e in others if row[e] >= min_score)]


CASES: list[tuple[Selection, Callable[[Row], list[int]]]] = [
    *((TopK(k), lambda row, k=k: choose_best(row, k)) for k in (1, 3, 6)),
    *(
        (GroupLimitedTopK(k, g, t), lambda row, k=k, g=g, t=t: choose_in_groups(row, k, g, t))
        for k, g, t in ((1, 3, 1), (3, 3, 2), (3, 2, 1), (6, 6, 6), (2, 6, 2), (4, 1, 1))
    ),
    *(
        (
            GroupLimitedTopK(k, g, t, GroupScore.MAX),
            lambda row, k=k, g=g, t=t: choose_in_groups(row, k, g, t, num_counted=1),
        )
        for k, g, t in ((1, 3, 1), (3, 3, 2), (3, 2, 1), (4, 1, 1))
    ),
    *(
        (Threshold(k, s), lambda row, k=k, s=s: choose_passing(row, k, s))
        for k, s in ((1, 0.5), (3, 0.25), (6, 0.5), (6, -9.0), (6, 9.0))
    ),
]


@pytest.mark.parametrize(
    ("selection", "choose_slowly"), CASES, ids=[str(selection) for selection, _ in CASES]
)
@settings(max_examples=40, deadline=None)
@given(scores=tables())
def test_equals_slow_loop(
    selection: Selection, choose_slowly: Callable[[Row], list[int]], scores: Tensor
) -> None:
    choice = selection.choose(scores)
    assert split(choice) == [choose_slowly(row) for row in scores.tolist()]
    assert choice.num_tokens == scores.shape[0]
    assert choice.token_offsets[-1] == choice.num_assignments
    assert choice.fixed_k == (None if isinstance(selection, Threshold) else selection.k)


@settings(max_examples=60, deadline=None)
@given(scores=tables(), k=st.integers(1, 6), min_score=SCORES)
def test_each_token_and_choice_exactly_once(scores: Tensor, k: int, min_score: float) -> None:
    for selection in (TopK(k), Threshold(k, min_score), GroupLimitedTopK(min(k, 4), 3, 2)):
        choice = selection.choose(scores)
        pairs = list(zip(choice.compute_token_ids().tolist(), choice.expert_ids.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs) == choice.num_assignments
        assert {token for token, _ in pairs} == set(range(scores.shape[0]))
        ranks = [r for experts in split(choice) for r in range(len(experts))]
        assert choice.compute_ranks().tolist() == ranks


def test_negative_scores_of_open_groups_win_against_closed_groups() -> None:
    """With zeros instead of minus infinity, a closed group would win here."""
    scores = torch.tensor([[-0.1, -0.2, -3.0, -3.0]])
    assert split(GroupLimitedTopK(2, 2, 1).choose(scores)) == [[0, 1]]


def test_groups_compete_with_their_best_or_with_their_two_best() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.6, 0.5]])
    assert split(GroupLimitedTopK(1, 2, 1, GroupScore.MAX).choose(scores)) == [[0]]
    assert split(GroupLimitedTopK(1, 2, 1).choose(scores)) == [[2]]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (TopK(0), r"top_k \(0\) must be between 1 and num_experts \(6\)"),
        (Threshold(7, 0.1), r"top_k \(7\) must be between 1 and num_experts \(6\)"),
        (
            GroupLimitedTopK(1, 4, 1),
            r"num_experts \(6\) must be divisible by .* groups \(4\); try 1, 2, 3, 6",
        ),
        (GroupLimitedTopK(1, 3, 4), r"groups that a token may use \(4\) must be between 1 and .* \(3\)"),
        (GroupLimitedTopK(3, 3, 1), r"top_k \(3\) must not exceed the 2 experts of 1 of 3 groups"),
    ],
)
def test_impossible_selections(selection: Selection, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        selection.require_possible(6)


@pytest.mark.parametrize("selection", [TopK(2), GroupLimitedTopK(2, 3, 2), Threshold(2, 0.1)])
def test_another_k_keeps_the_rule(selection: Selection) -> None:
    changed = selection.with_k(4)
    assert changed.k == 4
    assert changed.with_k(2) == selection


@pytest.mark.parametrize("table", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int32)])
def test_a_table_of_experts_has_rows_of_int64(table: Tensor) -> None:
    with pytest.raises(RoutingError, match=r"expert ids must be a \(tokens, k\) table of int64, got"):
        Choice.from_table(table)
