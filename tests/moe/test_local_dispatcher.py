"""The dispatcher of one device: every kept (token, choice) exactly once, nothing copied (law 8)."""

from __future__ import annotations

import pytest
import torch
from fake_seams import make_routing
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.kernels import BankView, compute_experts_summed
from moesys.moe import LocalDispatcher, Part, Routing


def dispatch(routing: Routing, hidden: int = 3) -> Part:
    x = torch.arange(routing.num_tokens * hidden, dtype=torch.float32).view(routing.num_tokens, hidden)
    (part,) = LocalDispatcher().dispatch(x, routing)
    return part


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    num_experts = draw(st.integers(1, 6))
    choices = draw(st.lists(st.lists(st.integers(0, num_experts - 1), max_size=4), max_size=8))
    num_assignments = sum(map(len, choices))
    flags = st.lists(st.booleans(), min_size=num_assignments, max_size=num_assignments)
    return make_routing(choices, num_experts, dropped=draw(st.none() | flags))


@settings(max_examples=150, deadline=None)
@given(routing=routings())
def test_every_kept_token_and_choice_is_dispatched_exactly_once(routing: Routing) -> None:
    part = dispatch(routing)
    dropped = (
        torch.zeros_like(routing.expert_ids, dtype=torch.bool) if routing.dropped is None else routing.dropped
    )
    kept = [
        (token, expert, weight)
        for token, expert, weight, is_dropped in zip(
            routing.compute_token_ids().tolist(),
            routing.expert_ids.tolist(),
            routing.weights.tolist(),
            dropped.tolist(),
            strict=True,
        )
        if not is_dropped
    ]
    # By expert: the groups hold the kept assignments, stable in token order. The weights are all different.
    group_sizes = part.rows.offsets.diff()
    expert_of_place = torch.repeat_interleave(torch.arange(routing.num_experts), group_sizes).tolist()
    dispatched = list(zip(part.rows.row_ids.tolist(), expert_of_place, part.weights_A.tolist(), strict=True))
    assert dispatched == sorted(kept, key=lambda assignment: assignment[1])
    # By token: the sums hold each place once, in the order of the token's choices.
    positions = part.token_sum.positions.tolist()
    assert sorted(positions) == list(range(len(kept)))
    assert [dispatched[place] for place in positions] == kept
    sizes = [sum(token == t for token, _, _ in kept) for t in range(routing.num_tokens)]
    assert part.token_sum.offsets.diff().tolist() == sizes
    assert part.token_sum.num_results == routing.num_tokens


def test_nothing_is_copied() -> None:
    x = torch.randn(3, 2)
    (part,) = LocalDispatcher().dispatch(x, make_routing([[0], [1], [0]], 2))
    assert part.rows.x_RD is x
    y = torch.randn(3, 2)
    assert LocalDispatcher().combine(y, part.handle) is y


def test_weights_stay_differentiable() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    routing = Routing(torch.tensor([1, 0, 1]), weights, torch.tensor([0, 2, 3]), 2)
    (dispatch(routing).weights_A * torch.tensor([10.0, 20.0, 30.0])).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [20.0, 10.0, 30.0]


@pytest.mark.parametrize("dropped", [[False, True, True], [True, True, True]])
def test_dropped_assignments_contribute_nothing(dropped: list[bool]) -> None:
    routing = make_routing([[0, 1], [1]], 2, dropped=dropped)
    part = dispatch(routing, hidden=2)
    view = BankView(torch.ones(2, 4, 2), torch.ones(2, 2, 2))
    y = compute_experts_summed(part.rows, view, part.weights_A, part.token_sum)
    (x_part,) = LocalDispatcher().dispatch(
        part.rows.x_RD, make_routing([[0] if not dropped[0] else [], []], 2)
    )
    assert torch.equal(y, compute_experts_summed(x_part.rows, view, x_part.weights_A, x_part.token_sum))
    assert not y[1].any()
