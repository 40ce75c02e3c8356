"""Balance loss and z-loss against slow loops, with gradients in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from fake_seams import make_routing
from torch import Tensor

from moesys.errors import ShapeError
from moesys.moe import Routing, compute_balance_loss, compute_router_z_loss

CHOICES = [[0, 2], [2, 1], [2, 3], [0, 2], [1, 2]]


def make_logits() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def route(logits_TE: Tensor) -> Routing:
    return make_routing(CHOICES, 4, fixed_k=2, logits_TE=logits_TE, scores_TE=logits_TE.softmax(-1))


def test_balance_loss_equals_slow_loop() -> None:
    scores = make_logits().softmax(-1).tolist()
    flat = [expert for experts in CHOICES for expert in experts]
    expected = 0.0
    for expert in range(4):
        share = flat.count(expert) / len(flat)
        expected += 4 * share * sum(row[expert] for row in scores) / len(scores)
    assert compute_balance_loss(route(make_logits())).item() == pytest.approx(expected, rel=1e-12)


def test_z_loss_equals_slow_loop() -> None:
    rows = make_logits().tolist()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(rows)
    assert compute_router_z_loss(route(make_logits())).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [compute_balance_loss, compute_router_z_loss])
def test_gradcheck(loss: Callable[[Routing], Tensor]) -> None:
    assert torch.autograd.gradcheck(lambda logits: loss(route(logits)), make_logits().requires_grad_())


def test_even_routing_gives_one_and_a_collapsed_one_the_number_of_experts() -> None:
    even = make_routing([[0], [1], [2], [3]], 4, scores_TE=torch.full((4, 4), 0.25))
    assert compute_balance_loss(even).item() == 1.0
    collapsed = make_routing([[1], [1]], 4, scores_TE=torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 2))
    assert compute_balance_loss(collapsed).item() == 4.0


def test_dropped_assignments_still_count_as_chosen() -> None:
    scores = make_logits().softmax(-1)
    kept, dropped = (make_routing(CHOICES, 4, dropped=d, scores_TE=scores) for d in (None, [True] * 10))
    assert torch.equal(compute_balance_loss(kept), compute_balance_loss(dropped))


@pytest.mark.parametrize("loss", [compute_balance_loss, compute_router_z_loss])
def test_no_tokens_give_zero(loss: Callable[[Routing], Tensor]) -> None:
    empty = torch.zeros(0, 4)
    assert loss(make_routing([], 4, logits_TE=empty, scores_TE=empty)).item() == 0


@pytest.mark.parametrize(
    ("loss", "name"), [(compute_balance_loss, "scores_TE"), (compute_router_z_loss, "logits_TE")]
)
def test_routing_without_statistics_is_an_error(loss: Callable[[Routing], Tensor], name: str) -> None:
    with pytest.raises(ShapeError, match=f"needs a Routing with {name}"):
        loss(make_routing([[0]], 1))
