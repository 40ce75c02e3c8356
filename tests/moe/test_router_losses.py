"""Balance loss and z-loss against slow loops, with gradients in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from fake_seams import make_routing
from torch import Tensor

from moesys.errors import ShapeError
from moesys.moe import (
    Routing,
    compute_balance_loss,
    compute_first_choice_balance_loss,
    compute_router_z_loss,
    compute_sequence_balance_loss,
)

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


@pytest.mark.parametrize("choices", [CHOICES, [[0], [2, 1, 3], [2], [0, 2], [1]]], ids=["fixed", "ragged"])
def test_first_choice_loss_equals_slow_loop(choices: list[list[int]]) -> None:
    scores = make_logits().softmax(-1)
    rows = scores.tolist()
    expected = 0.0
    for expert in range(4):
        share = sum(experts[0] == expert for experts in choices) / len(choices)
        expected += 4 * share * sum(row[expert] for row in rows) / len(rows)
    fixed_k = 2 if choices is CHOICES else None
    routing = make_routing(
        choices, 4, fixed_k=fixed_k, scores_TE=scores, dropped=[True] * sum(map(len, choices))
    )
    assert compute_first_choice_balance_loss(routing).item() == pytest.approx(expected, rel=1e-12)
    assert compute_balance_loss(routing).item() != pytest.approx(expected, rel=1e-3)


def test_first_choice_loss_of_one_choice_is_the_balance_loss() -> None:
    routing = make_routing([[e] for e, _ in CHOICES], 4, fixed_k=1, scores_TE=make_logits().softmax(-1))
    assert torch.equal(compute_first_choice_balance_loss(routing), compute_balance_loss(routing))


def test_first_choice_counts_of_several_ranks_give_the_loss_over_all_of_them() -> None:
    whole = route(make_logits())
    total = torch.zeros((), dtype=torch.float64)
    for span in (slice(0, 2), slice(2, 5)):
        part = make_routing(CHOICES[span], 4, fixed_k=2, scores_TE=make_logits()[span].softmax(-1))
        loss = compute_first_choice_balance_loss(part, whole.compute_first_choice_counts())
        total = total + len(CHOICES[span]) / len(CHOICES) * loss
    torch.testing.assert_close(total, compute_first_choice_balance_loss(whole), rtol=1e-12, atol=0)


def test_z_loss_equals_slow_loop() -> None:
    rows = make_logits().tolist()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(rows)
    assert compute_router_z_loss(route(make_logits())).item() == pytest.approx(expected, rel=1e-12)


LOSSES = [compute_balance_loss, compute_first_choice_balance_loss, compute_router_z_loss]


@pytest.mark.parametrize("loss", LOSSES)
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


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tokens_give_zero(loss: Callable[[Routing], Tensor]) -> None:
    empty = torch.zeros(0, 4)
    assert loss(make_routing([], 4, logits_TE=empty, scores_TE=empty)).item() == 0


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (compute_balance_loss, "scores_TE"),
        (compute_first_choice_balance_loss, "scores_TE"),
        (compute_router_z_loss, "logits_TE"),
    ],
)
def test_routing_without_statistics_is_an_error(loss: Callable[[Routing], Tensor], name: str) -> None:
    with pytest.raises(ShapeError, match=f"needs a Routing with {name}"):
        loss(make_routing([[0]], 1))


@pytest.mark.parametrize("num_sequences", [1, 2, 4])
def test_sequence_loss_is_the_mean_of_the_losses_of_the_sequences(num_sequences: int) -> None:
    """Against equations 17 to 20 of DeepSeek-V3, one sequence and one expert at a time."""
    choices = [[0, 2], [2, 1], [2, 3], [0, 2], [1, 2], [3, 1], [0, 1], [0, 3]]
    scores = torch.rand(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = (scores / scores.sum(1, keepdim=True)).requires_grad_()
    length = 8 // num_sequences
    expected = torch.zeros((), dtype=torch.float64)
    for start in range(0, 8, length):
        for expert in range(4):
            count = sum(expert in chosen for chosen in choices[start : start + length])
            expected += (
                4 / (2 * length) * count * scores[start : start + length, expert].mean() / num_sequences
            )
    found = compute_sequence_balance_loss(
        make_routing(choices, 4, fixed_k=2, scores_TE=scores), num_sequences
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_one_sequence_is_the_micro_batch() -> None:
    routing = route(make_logits())
    torch.testing.assert_close(compute_sequence_balance_loss(routing, 1), compute_balance_loss(routing))


def test_sequences_that_are_even_only_together_are_uneven() -> None:
    even = make_routing([[0], [0], [1], [1]], 2, scores_TE=torch.eye(2).repeat_interleave(2, dim=0))
    assert compute_balance_loss(even).item() == 1.0
    assert compute_sequence_balance_loss(even, 2).item() == 2.0


@pytest.mark.parametrize("num_sequences", [0, 2])
def test_sequences_have_equal_length(num_sequences: int) -> None:
    with pytest.raises(
        ShapeError, match=rf"the 5 tokens .* must be {num_sequences} sequences of equal length"
    ):
        compute_sequence_balance_loss(route(make_logits()), num_sequences)


def test_counts_of_a_larger_scope_give_the_loss_over_all_of_it() -> None:
    """Two ranks of different size: with summed counts, the mean by tokens is the loss of one pass."""
    logits = make_logits().requires_grad_()
    whole = compute_balance_loss(route(logits))
    counts = route(logits).compute_expert_counts()
    total = torch.zeros((), dtype=torch.float64)
    for span in (slice(0, 2), slice(2, 5)):
        choices = CHOICES[span]
        part = make_routing(choices, 4, fixed_k=2, scores_TE=logits[span].softmax(-1))
        total = total + len(choices) / len(CHOICES) * compute_balance_loss(part, counts)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (total, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_gradcheck_of_the_losses_with_a_scope() -> None:
    counts = torch.tensor([1, 7, 2, 0])
    logits = make_logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: compute_balance_loss(route(x), counts), logits)
    assert torch.autograd.gradcheck(lambda x: compute_sequence_balance_loss(route(x), 5), logits)
