"""Routers composed of score, selection and weighting: float64 references, gradients, bias, k per call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesys.errors import RoutingError
from moesys.moe import (
    BiasBalancer,
    Choice,
    GroupLimitedTopK,
    MoEConfig,
    MoELayer,
    Normalization,
    Router,
    Routing,
    Score,
    Selection,
    SparseMixer,
    Threshold,
    TopK,
    Weighting,
)

HIDDEN, NUM_EXPERTS = 5, 6
SELECTIONS: list[Selection] = [TopK(1), TopK(3), TopK(6), GroupLimitedTopK(3, 3, 2), Threshold(4, 0.2)]


def make_router(
    selection: Selection | None = None,
    *,
    score: Score = Score.SOFTMAX,
    normalization: Weighting = Normalization.NONE,
    scale: float = 1.0,
    bias: bool = False,
    logit_bias: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Router:
    router = Router(
        HIDDEN,
        NUM_EXPERTS,
        TopK(2) if selection is None else selection,
        score=score,
        weighting=normalization,
        scale=scale,
        has_bias=logit_bias,
        has_selection_bias=bias,
    )
    torch.nn.init.normal_(router.weight_ED, generator=torch.Generator().manual_seed(0))
    return router.to(dtype)


def make_x(num_tokens: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        num_tokens, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)


def split(choice: Choice) -> list[list[int]]:
    bounds = itertools.pairwise(choice.token_offsets.tolist())
    return [choice.expert_ids[start:end].tolist() for start, end in bounds]


def weigh_slowly(router: Router, x_TD: Tensor, choice: Choice) -> Tensor:
    """One token and one expert at a time, differentiable."""
    weights = []
    biases = torch.zeros(NUM_EXPERTS, dtype=x_TD.dtype) if router.bias_E is None else router.bias_E
    for x_D, experts in zip(x_TD, split(choice), strict=True):
        logits = [row @ x_D + bias for row, bias in zip(router.weight_ED, biases, strict=True)]
        if router.score is Score.SOFTMAX:
            total = sum(logit.exp() for logit in logits)
            scores = [logit.exp() / total for logit in logits]
        else:
            scores = [1 / (1 + (-logit).exp()) for logit in logits]
        match router.weighting:
            case Normalization.NONE:
                chosen = [scores[e] for e in experts]
            case Normalization.AFTER:
                chosen = [scores[e] / sum(scores[i] for i in experts) for e in experts]
            case Normalization.BEFORE:
                chosen = [logits[e].exp() / sum(logits[i].exp() for i in experts) for e in experts]
            case SparseMixer(epsilon=epsilon):
                chosen = mix_slowly(logits, experts, epsilon)
        weights += [router.scale * weight for weight in chosen]
    return torch.stack(weights)


def mix_slowly(logits: list[Tensor], experts: list[int], epsilon: float) -> list[Tensor]:
    """PhiMoE's rule: each expert's softmax among those still there whose logit is near its own."""
    weights, left = [], dict(enumerate(logits))
    for chosen in experts:
        best = left[chosen]
        near = [s for s in left.values() if (best - s) / max(abs(s), best) <= 2 * epsilon]
        weights.append(best.exp() / sum(s.exp() for s in near))
        del left[chosen]
    return weights


@pytest.mark.parametrize("normalization", list(Normalization))
@pytest.mark.parametrize("score", list(Score))
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_weights_and_gradients_equal_slow_loop(
    selection: Selection, score: Score, normalization: Normalization
) -> None:
    router = make_router(selection, score=score, normalization=normalization, scale=2.5)
    x = make_x().requires_grad_()
    routing = router(x)
    expected = weigh_slowly(router, x, routing.choice)
    torch.testing.assert_close(routing.weights, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.arange(routing.num_assignments, dtype=torch.float64).cos()
    inputs = [x, router.weight_ED]
    found = torch.autograd.grad(routing.weights, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("score", list(Score))
def test_the_distribution_of_each_token_sums_to_one(score: Score, selection: Selection) -> None:
    routing = make_router(selection, score=score)(make_x())
    assert routing.scores_TE is not None
    torch.testing.assert_close(routing.scores_TE.sum(1), torch.ones(9, dtype=torch.float64))
    expected = routing.logits_TE.softmax(1) if score is Score.SOFTMAX else routing.logits_TE.sigmoid()
    torch.testing.assert_close(routing.scores_TE, expected / expected.sum(1, keepdim=True))


def test_before_and_after_agree_for_softmax_and_differ_for_sigmoid() -> None:
    def weigh(score: Score, normalization: Normalization) -> Tensor:
        return make_router(TopK(3), score=score, normalization=normalization)(make_x()).weights

    before, after = Normalization.BEFORE, Normalization.AFTER
    torch.testing.assert_close(weigh(Score.SOFTMAX, before), weigh(Score.SOFTMAX, after))
    assert not torch.allclose(weigh(Score.SIGMOID, before), weigh(Score.SIGMOID, after))


def test_a_threshold_makes_a_ragged_routing() -> None:
    routing = make_router(Threshold(4, 0.2))(make_x())
    sizes = set(routing.token_offsets.diff().tolist())
    assert routing.fixed_k is None
    assert len(sizes) > 1
    assert sizes <= {1, 2, 3, 4}


def test_the_bias_changes_the_choice_and_no_weight() -> None:
    router = make_router(TopK(2), score=Score.SIGMOID, normalization=Normalization.AFTER, bias=True)
    x = make_x()
    before = router(x)
    assert router.selection_bias_E is not None
    router.selection_bias_E[4] = 10.0
    after = router(x)
    assert (after.expert_ids.view(-1, 2)[:, 0] == 4).all()
    assert not torch.equal(before.expert_ids, after.expert_ids)
    torch.testing.assert_close(after.weights, weigh_slowly(router, x, after.choice), rtol=1e-10, atol=1e-12)
    assert torch.equal(after.scores_TE, before.scores_TE)


def test_the_bias_is_saved_with_the_model_and_not_trained() -> None:
    biased, plain = make_router(bias=True), make_router()
    assert set(biased.state_dict()) == {"weight_ED", "selection_bias_E"}
    assert set(plain.state_dict()) == {"weight_ED"}
    assert [name for name, _ in biased.named_parameters()] == ["weight_ED"]


def test_experts_whose_scores_underflow_get_finite_weights_and_gradients() -> None:
    router = make_router(TopK(1), normalization=Normalization.AFTER, bias=True, dtype=torch.float32)
    assert router.selection_bias_E is not None
    router.selection_bias_E[0] = 10.0
    with torch.no_grad():
        router.weight_ED.zero_()
        router.weight_ED[1] = 100.0
    x = torch.ones(2, HIDDEN, requires_grad=True)
    weights = router(x).weights
    weights.sum().backward()
    assert weights.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_k_can_change_at_every_call(selection: Selection) -> None:
    router, x = make_router(selection), make_x()
    for k in (1, 2, 4, selection.k):
        if isinstance(selection, GroupLimitedTopK) and k > 4:
            continue
        expected = make_router(selection.with_k(k))(x)
        assert_same(router(x, top_k=k), expected)
    assert_same(router(x), make_router(selection)(x))
    with pytest.raises(RoutingError, match=r"top_k \(7\) must be between 1 and num_experts \(6\)"):
        router(x, top_k=7)


def assert_same(first: Routing, second: Routing) -> None:
    assert torch.equal(first.expert_ids, second.expert_ids)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.token_offsets, second.token_offsets)
    assert first.fixed_k == second.fixed_k


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("normalization", list(Normalization))
def test_a_given_choice_is_used_and_weighed_with_gradients(
    selection: Selection, normalization: Normalization
) -> None:
    router, x = make_router(selection, normalization=normalization), make_x().requires_grad_()
    routing = router(x)
    assert_same(router(x, given=routing.choice), routing)
    with torch.no_grad():
        router.weight_ED.neg_()
    replayed = router(x, given=routing.choice)
    assert torch.equal(replayed.expert_ids, routing.expert_ids)
    assert not torch.equal(router(x).expert_ids, routing.expert_ids) or selection.k == NUM_EXPERTS
    torch.testing.assert_close(replayed.weights, weigh_slowly(router, x, routing.choice))
    assert torch.autograd.grad(replayed.weights.square().sum(), x)[0].isfinite().all()


def test_tasks_that_own_an_expert_each_get_the_weight_one() -> None:
    tasks = torch.tensor([[3], [0], [3]])
    routing = make_router(normalization=Normalization.AFTER)(make_x(3), given=Choice.from_table(tasks))
    assert routing.expert_ids.tolist() == [3, 0, 3]
    assert routing.weights.tolist() == [1.0, 1.0, 1.0]
    assert routing.fixed_k == 1


def test_a_given_choice_of_other_tokens_is_an_error() -> None:
    with pytest.raises(RoutingError, match="the given choice is of 2 tokens, x has 9"):
        make_router()(make_x(), given=Choice.from_table(torch.zeros(2, 1, dtype=torch.int64)))


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("score", list(Score))
def test_same_input_same_bits_and_float32_whatever_the_model(score: Score, selection: Selection) -> None:
    router = make_router(selection, score=score, normalization=Normalization.AFTER, dtype=torch.float32)
    x = make_x(64, torch.bfloat16)
    first = router(x)
    assert first.weights.dtype == first.logits_TE.dtype == first.scores_TE.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(router(x), first)
    assert_same(router(x.float()), first)


@pytest.mark.parametrize("normalization", list(Normalization))
@pytest.mark.parametrize("score", list(Score))
def test_gradcheck_through_the_weights(score: Score, normalization: Normalization) -> None:
    router = make_router(Threshold(4, 0.1), score=score, normalization=normalization)
    x = make_x(4)
    choice = router(x).choice
    check: Callable[[Tensor], Tensor] = lambda x: router(x, given=choice).weights  # noqa: E731
    assert torch.autograd.gradcheck(check, x.requires_grad_())


def test_no_tokens() -> None:
    for selection in SELECTIONS:
        for normalization in Normalization:
            routing = make_router(selection, normalization=normalization)(make_x(0))
            assert (routing.num_tokens, routing.num_assignments) == (0, 0)


def test_large_logits_do_not_overflow() -> None:
    router = make_router(TopK(2), normalization=Normalization.BEFORE, dtype=torch.float32)
    with torch.no_grad():
        router.weight_ED.mul_(1e4)
    weights = router(make_x(dtype=torch.float32)).weights.view(-1, 2)
    assert math.isclose(weights.sum(1).min().item(), 1.0, rel_tol=1e-6)


@pytest.mark.parametrize("epsilon", [0.01, 0.2, 0.6])
@pytest.mark.parametrize("selection", [TopK(1), TopK(2), TopK(4), GroupLimitedTopK(3, 3, 2)], ids=str)
def test_a_sparse_mixer_equals_its_formula(selection: Selection, epsilon: float) -> None:
    router = make_router(selection, normalization=SparseMixer(epsilon), logit_bias=True)
    assert router.bias_E is not None
    torch.nn.init.normal_(router.bias_E, generator=torch.Generator().manual_seed(2))
    x = make_x(40).requires_grad_()
    routing = router(x)
    expected = weigh_slowly(router, x, routing.choice)
    torch.testing.assert_close(routing.weights, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.arange(routing.num_assignments, dtype=torch.float64).cos()
    inputs = [x, router.weight_ED, router.bias_E]
    found = torch.autograd.grad(routing.weights, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert not router.is_normalized
    router.require_learnable(1)


def test_a_sparse_mixer_drops_what_is_far_and_keeps_what_is_near() -> None:
    """Logits by hand: 2, 1.9, -3, -3.1, and then -12, -11.9, -7, -6.9, where the best is negative too."""
    router = Router(1, 4, TopK(2), weighting=SparseMixer(0.05)).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor([[2.0], [1.9], [-3.0], [-3.1]]))
    weights = router(torch.ones(1, 1, dtype=torch.float64)).weights.tolist()
    assert weights == pytest.approx([1 / (1 + math.exp(-0.1)), 1.0])
    with torch.no_grad():
        router.weight_ED.neg_().sub_(10.0)
    weights = router(torch.ones(1, 1, dtype=torch.float64)).weights.tolist()
    assert weights == pytest.approx([1 / (1 + math.exp(-0.1)), 1.0])


def test_gradcheck_through_a_sparse_mixer() -> None:
    router = make_router(TopK(2), normalization=SparseMixer(0.4))
    x = make_x(4)
    choice = router(x).choice
    assert torch.autograd.gradcheck(lambda x: router(x, given=choice).weights, x.requires_grad_())


def test_a_sparse_mixer_refuses_different_numbers_of_experts() -> None:
    with pytest.raises(
        RoutingError, match="a SparseMixer weighs a fixed number of experts per token; use TopK"
    ):
        make_router(Threshold(4, 0.1), normalization=SparseMixer(0.1))(make_x())


@pytest.mark.parametrize("normalization", list(Normalization))
def test_the_bias_of_the_logits_enters_choice_and_weights(normalization: Normalization) -> None:
    router, x = make_router(TopK(2), normalization=normalization, logit_bias=True), make_x().requires_grad_()
    before = router(x)
    assert router.bias_E is not None
    with torch.no_grad():
        router.bias_E[4] = 20.0
    routing = router(x)
    assert (routing.expert_ids.view(-1, 2)[:, 0] == 4).all()
    torch.testing.assert_close(routing.logits_TE[:, 4], before.logits_TE[:, 4] + 20.0)
    torch.testing.assert_close(
        routing.weights, weigh_slowly(router, x, routing.choice), rtol=1e-10, atol=1e-12
    )
    assert {"weight_ED", "bias_E"} == set(router.state_dict()) == dict(router.named_parameters()).keys()


def test_a_selection_bias_without_a_rate_stays_and_is_saved() -> None:
    """As in a model that was loaded."""
    fixed = MoELayer(HIDDEN, MoEConfig(NUM_EXPERTS, 2, 4, selection_bias=True))
    moving = MoELayer(HIDDEN, MoEConfig(NUM_EXPERTS, 2, 4, bias_update_rate=0.5))
    for layer, moves in ((fixed, False), (moving, True)):
        assert layer.router.selection_bias_E is not None
        layer.router.selection_bias_E.copy_(torch.arange(6.0))
        balancer = BiasBalancer(layer)
        balancer.add({0: layer(make_x(dtype=torch.float32))[1]})
        balancer.apply()
        saved = layer.state_dict()["router.selection_bias_E"]
        assert torch.equal(saved, torch.arange(6.0)) != moves
    assert MoELayer(HIDDEN, MoEConfig(NUM_EXPERTS, 2, 4)).router.selection_bias_E is None


@pytest.mark.parametrize("weighting", [SparseMixer(0.01), Normalization.BEFORE])
def test_a_softmax_of_logits_is_chosen_by_logits(weighting: SparseMixer | Normalization) -> None:
    """A softmax over all experts makes equal zeros of those far behind the first."""
    router = Router(1, 3, TopK(2), weighting=weighting)
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor([[200.0], [50.0], [90.0]]))
    routing = router(torch.ones(1, 1))
    assert routing.expert_ids.tolist() == [0, 2]
    if isinstance(weighting, SparseMixer):
        torch.testing.assert_close(routing.weights, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("normalization", [Normalization.NONE, Normalization.AFTER])
@torch.no_grad()
def test_one_call_of_inference_has_the_bits_of_its_steps(
    normalization: Normalization, score: Score, bias: bool, dtype: torch.dtype
) -> None:
    """A router that is given what it would choose weighs it step by step."""
    router = make_router(
        score=score, normalization=normalization, scale=2.5, bias=bias, logit_bias=bias, dtype=dtype
    )
    if router.selection_bias_E is not None:
        router.selection_bias_E.copy_(torch.linspace(-0.2, 0.2, NUM_EXPERTS))
    for k in (1, 2, NUM_EXPERTS):
        routing = router(make_x(dtype=dtype), top_k=k)
        assert routing.logits_TE is not None
        assert routing.is_finite
        steps = router(make_x(dtype=dtype), given=choose_stepwise(router, routing.logits_TE, k))
        assert steps.is_finite is None
        assert routing.fixed_k == steps.fixed_k == k
        for name in ("expert_ids", "token_offsets", "weights", "logits_TE", "scores_TE"):
            assert torch.equal(getattr(routing, name), getattr(steps, name)), name


def choose_stepwise(router: Router, logits_TE: Tensor, k: int) -> Choice:
    scores_TE = logits_TE.softmax(dim=1) if router.score is Score.SOFTMAX else logits_TE.sigmoid()
    bias_E = router.selection_bias_E
    return TopK(k).choose(scores_TE if bias_E is None else scores_TE + bias_E)


@torch.no_grad()
def test_the_kernel_sees_logits_that_are_not_finite() -> None:
    layer = MoELayer(HIDDEN, MoEConfig(NUM_EXPERTS, 2, 4), layer_id=3)
    x = make_x(dtype=torch.float32)
    x[[2, 5], 0] = math.inf
    assert layer.router(x).is_finite is False
    with pytest.raises(RoutingError, match="layer 3: router logits are NaN or Inf for 2 of 9 tokens"):
        layer(x)


@torch.no_grad()
def test_an_impossible_k_is_refused_in_the_kernel_too() -> None:
    with pytest.raises(RoutingError, match=r"top_k \(7\) must be between 1 and num_experts \(6\)"):
        make_router(dtype=torch.float32)(make_x(dtype=torch.float32), top_k=7)
