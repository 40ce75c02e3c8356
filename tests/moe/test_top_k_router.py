"""The router of most families against a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesys.errors import RoutingError
from moesys.moe import Choice, Normalization, TopKRouter


def make_router(
    num_experts: int = 6, top_k: int = 3, *, normalize: bool = True, hidden: int = 5
) -> TopKRouter:
    torch.manual_seed(0)
    router = TopKRouter(hidden, num_experts, top_k, normalize=normalize)
    torch.nn.init.normal_(router.weight_ED)
    return router


def route_slowly(router: TopKRouter, x_D: Tensor) -> list[tuple[int, float]]:
    """(expert, weight) of each choice of one token, in plain Python floats."""
    logits = [sum(a * b for a, b in zip(row, x_D.tolist(), strict=True)) for row in router.weight_ED.tolist()]
    exponentials = [math.exp(logit - max(logits)) for logit in logits]
    scores = [e / sum(exponentials) for e in exponentials]
    chosen = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))[: router.selection.k]
    total = sum(scores[e] for e in chosen) if router.weighting is Normalization.AFTER else 1.0
    return [(e, scores[e] / total) for e in chosen]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_equals_slow_loop(top_k: int, normalize: bool) -> None:
    router = make_router(top_k=top_k, normalize=normalize)
    x = torch.randn(9, 5)
    routing = router(x)
    expected = [choice for x_D in x for choice in route_slowly(router, x_D)]
    assert routing.expert_ids.tolist() == [expert for expert, _ in expected]
    torch.testing.assert_close(routing.weights, torch.tensor([w for _, w in expected]), rtol=1e-5, atol=1e-7)
    assert routing.fixed_k == top_k
    assert routing.num_experts == 6
    assert routing.token_offsets.tolist() == list(range(0, 9 * top_k + 1, top_k))
    assert torch.equal(routing.scores_TE, routing.logits_TE.softmax(-1))


def test_ties_go_to_the_lower_expert_id() -> None:
    router = make_router(num_experts=40, top_k=5)
    with torch.no_grad():
        router.weight_ED.zero_()
        router.weight_ED[[30, 12]] = 1.0
    assert router(torch.ones(2, 5)).expert_ids.view(2, 5).tolist() == [[12, 30, 0, 1, 2]] * 2


def test_bf16_tokens_are_routed_in_float32() -> None:
    router = make_router()
    x = torch.randn(7, 5).bfloat16()
    routing, expected = router(x), router(x.float())
    assert routing.weights.dtype == routing.logits_TE.dtype == routing.scores_TE.dtype == torch.float32
    assert torch.equal(routing.logits_TE, expected.logits_TE)


def test_autocast_does_not_narrow_the_router() -> None:
    router, x = make_router(), torch.randn(7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert routing.logits_TE.dtype == torch.float32
    assert torch.equal(routing.logits_TE, router(x).logits_TE)


def test_replay_uses_the_given_experts_and_keeps_gradients() -> None:
    router = make_router(top_k=2)
    x = torch.randn(4, 5, requires_grad=True)
    given_ids = torch.tensor([[5, 0], [1, 2], [0, 4], [3, 5]])
    routing = router(x, given=Choice.from_table(given_ids))
    assert torch.equal(routing.expert_ids.view(4, 2), given_ids)
    chosen = routing.logits_TE.softmax(-1).gather(1, given_ids)
    torch.testing.assert_close(routing.weights.view(4, 2), chosen / chosen.sum(-1, keepdim=True))
    routing.weights[::2].sum().backward()
    assert router.weight_ED.grad is not None
    assert router.weight_ED.grad.any()
    assert x.grad is not None
    assert x.grad.any()


def test_replaying_its_own_choice_changes_no_bit() -> None:
    router, x = make_router(top_k=2), torch.randn(4, 5)
    routing = router(x)
    again = router(x, given=routing.choice)
    assert torch.equal(again.expert_ids, routing.expert_ids)
    assert torch.equal(again.weights, routing.weights)


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_must_be_possible(top_k: int) -> None:
    with pytest.raises(
        RoutingError, match=rf"top_k \({top_k}\) must be between 1 and num_experts \(4\); lower top_k"
    ):
        TopKRouter(8, 4, top_k)
