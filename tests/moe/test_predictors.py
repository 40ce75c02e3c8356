"""Each predictor guesses by its rule, and what guesses are worth is counted as it is."""

from __future__ import annotations

import pytest
import torch
from fake_seams import make_routing

from moesys.moe import Execution, LocalDispatcher, MoEConfig, MoELayer, ResidentSource, Routing, TopKRouter
from moesys.moe.expert_key import ExpertKey
from moesys.moe.prediction_score import PredictionScore, ScoredPredictor
from moesys.moe.predictors import EarlyRouter, LastIteration, NextLayer, Predictor, SamplePaths
from moesys.moe.routing_log import RoutingRecorder


@pytest.fixture(autouse=True)
def _torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on the kernel, and the native one takes a while to build."""
    monkeypatch.setenv("MOESYS_KERNEL", "torch")


def route(*choices: list[int], num_experts: int = 8) -> Routing:
    ids = [len(experts) for experts in choices]
    return make_routing(choices, num_experts, fixed_k=ids[0] if len(set(ids)) == 1 else None)


def see(predictor: Predictor, *steps: dict[int, Routing]) -> None:
    for step in steps:
        for layer_id, routing in step.items():
            predictor.observe(layer_id, routing, None)


def test_the_next_layer_is_all_of_it_and_after_the_last_comes_the_first() -> None:
    predictor = NextLayer({1: 2, 4: 3})
    assert predictor.guess(1) == [(4, 0), (4, 1), (4, 2)]
    assert predictor.guess(4) == [(1, 0), (1, 1)]


def test_the_last_iteration_is_what_the_next_layer_needed_before() -> None:
    predictor = LastIteration([0, 1])
    predictor.observe(0, route([3, 1]), None)
    assert predictor.guess(0) == []
    see(predictor, {1: route([6, 5])}, {0: route([2, 4])})
    assert predictor.guess(0) == [(1, 6), (1, 5)]
    predictor.observe(1, route([0, 7]), None)
    assert predictor.guess(1) == [(0, 2), (0, 4)]


def test_after_a_prompt_the_last_iteration_guesses_as_many_as_are_needed_now() -> None:
    predictor = LastIteration([0, 1])
    prompt = route([3, 1], [1, 2], [1, 3], [0, 3])
    see(predictor, {0: prompt, 1: prompt}, {0: route([5, 6])})
    assert predictor.guess(0) == [(1, 3), (1, 1)], "those of most tokens"
    see(predictor, {1: route([4, 6], [5, 7])}, {0: route([1, 2])})
    assert predictor.guess(0) == [(1, 4), (1, 5)], "among equals first choices"


def test_sample_paths_guess_where_tokens_of_the_same_expert_went() -> None:
    predictor = SamplePaths({0: 8, 1: 8, 3: 4})
    see(predictor, {0: route([1], [2], [1]), 1: route([5], [6], [5]), 3: route([0], [1], [2], num_experts=4)})
    see(predictor, {0: route([2])})
    assert predictor.guess(0) == [(1, 6)]
    see(predictor, {0: route([1], [2])})
    assert predictor.guess(0) == [(1, 5), (1, 6)]
    see(predictor, {1: route([6])})
    assert predictor.guess(1) == [(3, 1)]
    assert predictor.guess(3) == []
    see(predictor, {0: route([7])})
    assert predictor.guess(0) == [], "nobody has gone from there"


def test_sample_paths_weigh_the_experts_of_all_tokens() -> None:
    predictor = SamplePaths({0: 8, 1: 8})
    for there in ([4, 5], [4, 6], [4, 7]):
        see(predictor, {0: route([0, 1]), 1: route(there)})
    see(predictor, {0: route([2, 3]), 1: route([6, 7])}, {0: route([0, 2])})
    assert predictor.guess(0) == [(1, 6), (1, 7)]
    see(predictor, {0: route([0, 1], [0, 2])})
    assert predictor.guess(0) == [(1, 4), (1, 6), (1, 7)]


def test_sample_paths_learn_the_same_online_and_from_a_log() -> None:
    torch.manual_seed(0)
    recorder = RoutingRecorder(ResidentSource({}))
    online, learned = SamplePaths({0: 8, 1: 8, 2: 8}), SamplePaths({0: 8, 1: 8, 2: 8})
    for _ in range(20):
        for layer in range(3):
            routing = route(*(torch.randperm(8)[:2].tolist() for _ in range(3)))
            recorder.hint(layer, routing)
            online.observe(layer, routing, None)
    learned.learn(recorder.make_log())
    for layer in (0, 1):
        assert torch.equal(online._counts_EF[layer], learned._counts_EF[layer])
        assert online._counts_EF[layer].sum() == 20 * 3 * 4


def test_the_early_router_asks_the_next_layers_router() -> None:
    torch.manual_seed(0)
    layers = [MoELayer(4, MoEConfig(8, 2, 3), layer_id=i).eval() for i in (0, 1, 2)]
    routers = {layer.layer_id: layer.router for layer in layers}
    source = ResidentSource({layer.layer_id: layer.experts for layer in layers})
    execution = Execution(LocalDispatcher(), source)
    x = torch.randn(1, 4)
    with EarlyRouter(routers) as predictor:
        assert predictor.guess(0) == []
        for layer, following in ((layers[0], 1), (layers[1], 2)):
            layer(x, execution)
            expected = routers[following](x).expert_ids.tolist()
            layer(x, execution)
            assert predictor.guess(layer.layer_id) == [(following, expert) for expert in expected]
        layers[2](x, execution)
        assert predictor.guess(2) == []
        assert predictor.guess(0) == [], "what was seen is another layer's"
    assert not any(router._forward_pre_hooks for router in routers.values())
    assert predictor.guess(1) == []


def test_the_early_router_takes_what_it_is_given() -> None:
    routers = {0: TopKRouter(4, 8, 2), 1: TopKRouter(4, 8, 2)}
    with EarlyRouter(routers) as predictor:
        x = torch.randn(3, 4)
        predictor.observe(0, route([1, 2]), x)
        assert {key[1] for key in predictor.guess(0)} == set(routers[1].forward(x).expert_ids.tolist())


class Told:
    def __init__(self, guesses: list[ExpertKey]) -> None:
        self.guesses = guesses

    def observe(self, layer_id: int, routing: Routing, x_TD: object) -> None: ...

    def guess(self, layer_id: int) -> list[ExpertKey]:
        return self.guesses


def test_only_guesses_that_cost_a_read_count() -> None:
    here: set[ExpertKey] = {(1, 1), (1, 2)}
    told = Told([(1, 1), (1, 3), (1, 4)])
    predictor = ScoredPredictor(told, here.__contains__)
    assert predictor.guess(0) == told.guesses
    here |= {(1, 3), (1, 4)}
    predictor.observe(1, route([1, 3, 5]), None)
    assert predictor.score == PredictionScore(num_guessed=2, num_right=1, num_missing=2)
    assert (predictor.score.precision, predictor.score.recall, predictor.score.num_wasted) == (0.5, 0.5, 1)
    predictor.observe(2, route([0]), None)
    assert predictor.score == PredictionScore(2, 1, 3)


def test_scores_of_nothing() -> None:
    assert (PredictionScore().precision, PredictionScore().recall) == (0, 0)


def test_a_guess_builds_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    router, seen = TopKRouter(4, 8, 2), []
    route_x = router.forward

    def watch(x_TD: torch.Tensor) -> Routing:
        seen.append(route_x(x_TD).weights.requires_grad)
        return route_x(x_TD)

    monkeypatch.setattr(router, "forward", watch)
    with EarlyRouter({0: router, 1: router}) as predictor:
        predictor.observe(0, route([1]), torch.randn(1, 4))
        predictor.guess(0)
    assert seen == [False]
