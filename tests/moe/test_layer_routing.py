"""Routing inside the layer: k and capacity per call, given experts, replay, bad logits, same bits."""

from __future__ import annotations

import pytest
import torch
from layer_cases import (
    CONFIGS,
    LAYER,
    NUM_EXPERTS,
    assert_all_close,
    assert_all_equal,
    make_layer,
    make_x,
    run,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesys.errors import RoutingError, ShapeError
from moesys.moe import (
    Capacity,
    CapacityFormula,
    Choice,
    Execution,
    LoadMeter,
    LocalDispatcher,
    MoEConfig,
    MoELayer,
    Normalization,
    ResidentSource,
    Router,
    RoutingTape,
    Threshold,
    TopK,
    TopKRouter,
)


def make_execution(layer: MoELayer, **options: object) -> Execution:
    return Execution(LocalDispatcher(), ResidentSource({LAYER: layer.experts}), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 2, NUM_EXPERTS])
def test_k_per_call(k: int) -> None:
    layer = make_layer(MoEConfig(NUM_EXPERTS, 3, 4, weighting=Normalization.NONE))
    expected = make_layer(MoEConfig(NUM_EXPERTS, k, 4, weighting=Normalization.NONE))
    assert_all_equal(run(layer, make_execution(layer, top_k=k)), run(expected))


def test_capacity_per_call() -> None:
    layer, x = make_layer(CONFIGS["capacity"]), make_x()
    dropless = make_layer(MoEConfig(NUM_EXPERTS, 2, 4))
    assert layer(x)[1].count_dropped() > 0
    unbounded = make_execution(layer, capacity=Capacity.unbounded())
    assert_all_equal(run(layer, unbounded), run(dropless))
    assert layer(x, unbounded)[1].dropped is None
    bounded = make_execution(dropless, capacity=CONFIGS["capacity"].capacity)
    assert_all_equal(run(dropless, bounded), run(layer))


@pytest.mark.parametrize(("factor", "limit"), [(0.7, 4), (0.0, None), (-0.7, 4), (-1.4, None)])
def test_tutels_factors_reach_the_layer_from_its_config(factor: float, limit: int | None) -> None:
    """13 tokens, 6 experts, k = 2: 2 * int(0.7 * 3) = 2, and 2 * int(1.4 * 3) = 8 is more than any expert needs."""
    capacity = Capacity.by_formula(CapacityFormula.TUTEL, factor)
    layer, x = make_layer(MoEConfig(NUM_EXPERTS, 2, 4, capacity=capacity)), make_x()
    _, routing = layer(x)
    need = int(routing.compute_expert_counts().max())
    assert 4 < need < 8
    assert routing.count_dropped() == (
        0 if limit is None else int((routing.compute_expert_counts() - limit).clamp_min(0).sum())
    )
    assert capacity.compute_limit(routing) == (need if limit is None else limit)


def test_weights_of_survivors_grow_only_where_the_router_normalises() -> None:
    capacity = Capacity.deepspeed(0.5, min_capacity=0)
    for weighting in (Normalization.AFTER, Normalization.NONE):
        config = MoEConfig(NUM_EXPERTS, 2, 4, weighting=weighting, capacity=capacity)
        layer, x = make_layer(config), make_x()
        _, routing = layer(x)
        assert routing.dropped is not None
        free = layer.router(x).weights
        loses_one = routing.dropped.view(-1, 2).sum(1) == 1
        survivors = (~routing.dropped.view(-1, 2) & loses_one.unsqueeze(1)).flatten()
        assert survivors.any()
        expected = torch.ones_like(free) if weighting is Normalization.AFTER else free
        torch.testing.assert_close(routing.weights[survivors], expected[survivors])


def test_drops_are_zero_counted_and_seen_by_the_meter() -> None:
    layer, x = make_layer(MoEConfig(NUM_EXPERTS, 1, 4, weighting=Normalization.NONE)), make_x()
    y, routing = layer(x)
    few = make_execution(layer, capacity=Capacity.tutel(0.7))
    y_few, routing_few = layer(x, few)
    counts = routing.compute_expert_counts()
    # Tutel: int(0.7 * ceil(13 / 6)) = 2 per expert.
    num_dropped = int((counts - 2).clamp_min(0).sum())
    assert routing_few.count_dropped() == num_dropped > 0
    assert routing_few.dropped is not None
    assert not y_few[routing_few.dropped].any()
    torch.testing.assert_close(y_few[~routing_few.dropped], y[~routing_few.dropped])
    meter = LoadMeter()
    meter.add({LAYER: routing_few})
    load = meter.drain()
    assert load.dropped == num_dropped
    assert load.expert_tokens == [counts.tolist()]


def test_given_experts_are_computed() -> None:
    layer, x = make_layer(MoEConfig(NUM_EXPERTS, 1, 4)), make_x()
    assert layer.training
    tasks = torch.arange(13) % 4
    y, routing = layer(x, given=Choice.from_table(tasks.unsqueeze(1)))
    assert torch.equal(routing.expert_ids, tasks)
    for task in range(4):
        (alone,) = (layer(x[tasks == task], given=Choice.from_table(tasks[tasks == task].unsqueeze(1)))[0],)
        torch.testing.assert_close(y[tasks == task], alone)


@pytest.mark.parametrize("bad", [-1, NUM_EXPERTS])
def test_given_experts_must_exist(bad: int) -> None:
    ids = torch.zeros(13, 1, dtype=torch.int64)
    ids[4] = bad
    with pytest.raises(RoutingError, match=r"expert ids must be between 0 and 5, got"):
        make_layer(CONFIGS["switch"])(make_x(), given=Choice.from_table(ids))


@pytest.mark.parametrize(
    ("given", "number"),
    [
        (Choice.from_table(torch.zeros(13, 1, dtype=torch.int64)), "1"),
        (
            Choice(torch.zeros(14, dtype=torch.int64), torch.tensor([0, *range(2, 15)])),
            "different numbers of",
        ),
    ],
    ids=["one", "ragged"],
)
def test_given_experts_must_not_contradict_the_k_of_the_call(given: Choice, number: str) -> None:
    layer, x = make_layer(CONFIGS["top-3"]), make_x()
    with pytest.raises(RoutingError, match=rf"given choice has {number} experts per token, .* top_k \(2\)"):
        layer(x, make_execution(layer, top_k=2), given=given)
    layer(x, given=given)
    layer(x, make_execution(layer, top_k=1), given=Choice.from_table(torch.zeros(13, 1, dtype=torch.int64)))


def test_a_replayed_ragged_choice_does_not_contradict_the_k_of_the_call() -> None:
    layer, x, tape = make_layer(CONFIGS["threshold"]), make_x(), RoutingTape()
    execution = make_execution(layer, top_k=2, tape=tape)
    _, recorded = layer(x, execution)
    with tape.make_contexts()[1]:
        _, replayed = layer(x, execution)
    assert torch.equal(replayed.expert_ids, recorded.expert_ids)


NORMALIZED_SWITCH = MoEConfig(NUM_EXPERTS, 1, 4)


@pytest.mark.parametrize(
    ("config", "top_k"),
    [(NORMALIZED_SWITCH, None), (CONFIGS["top-3"], 1), (CONFIGS["threshold"], 1)],
    ids=["config", "call", "threshold call"],
)
def test_a_router_that_could_not_learn_is_an_error_in_training(config: MoEConfig, top_k: int | None) -> None:
    layer, x = make_layer(config), make_x()
    execution = make_execution(layer, top_k=top_k)
    with pytest.raises(
        RoutingError, match=r"top_k \(1\) with normalisation makes .* use weighting=Normalization.NONE"
    ):
        layer(x, execution)
    layer.router.weight_ED.requires_grad_(False)
    layer(x, execution)
    layer.router.weight_ED.requires_grad_(True)
    with torch.no_grad():
        layer(x, execution)
    layer.eval()
    assert (layer(x, execution)[1].weights == 1).all()


def test_one_normalised_choice_is_fine_where_there_is_one_expert_or_more_choices() -> None:
    run(make_layer(MoEConfig(1, 1, 4)))
    layer = make_layer(NORMALIZED_SWITCH)
    run(layer, make_execution(layer, top_k=2))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("experts_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_router_sees_what_the_experts_dtype_would_round(
    experts_dtype: torch.dtype, autocast: bool
) -> None:
    layer, x = make_layer(CONFIGS["top-3"], torch.float32), make_x(64, torch.float32)
    layer.experts.to(experts_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, routing = layer(x)
    exact, rounded = layer.router(x), layer.router(x.bfloat16())
    assert torch.equal(routing.logits_TE, exact.logits_TE)
    assert not torch.equal(exact.logits_TE, rounded.logits_TE)
    assert y.dtype == torch.float32


def run_recomputed(layer: MoELayer, tape: RoutingTape) -> tuple[Tensor, Tensor]:
    """Output of the layer, to be differentiated through a recomputation."""
    x = make_x().requires_grad_()
    execution = make_execution(layer, tape=tape)
    y = checkpoint(lambda x: layer(x, execution)[0], x, use_reentrant=False, context_fn=tape.make_contexts)
    assert isinstance(y, Tensor)
    return x, y


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_recomputation_replays_each_router_and_its_drops(config: MoEConfig) -> None:
    """The scores are turned round in between, as near ties would be: only a replay gives the kept gradients."""
    layer = make_layer(config)
    kept = run(layer)
    x, y = run_recomputed(layer, RoutingTape())
    layer.router.selection = _Reversed(layer.router.selection)
    if layer.capacity is not None:
        layer.capacity = Capacity.deepspeed(0.3, min_capacity=0)
    upstream = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    assert_all_equal([y.detach(), *gradients], kept)


class _Reversed:
    """The same rule on scores of the opposite sign."""

    def __init__(self, selection: object) -> None:
        self._selection = selection

    @property
    def k(self) -> int:
        return self._selection.k  # type: ignore[attr-defined]

    def choose(self, scores_TE: Tensor) -> Choice:
        return self._selection.choose(-scores_TE)  # type: ignore[attr-defined]


def test_choosing_again_would_give_other_gradients() -> None:
    layer = make_layer(CONFIGS["top-3"])
    kept = run(layer)
    layer.router.selection = _Reversed(layer.router.selection)  # type: ignore[assignment]
    assert not torch.allclose(run(layer)[0], kept[0])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_same_seed_same_bits(config: MoEConfig) -> None:
    assert_all_equal(run(make_layer(config)), run(make_layer(config)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_token_does_not_depend_on_its_neighbours(config: MoEConfig) -> None:
    """With a capacity, only a token that others pushed out of an expert does; without a limit none does."""
    layer, x = make_layer(config), make_x()
    y, routing = layer(x)
    alone = torch.cat([layer(x[i : i + 1])[0] for i in range(13)])
    is_whole = torch.ones(13, dtype=torch.bool)
    if routing.dropped is not None:
        is_whole[routing.compute_token_ids()[routing.dropped]] = False
        assert 0 < is_whole.sum() < 13
        assert ((alone - y).abs().amax(dim=1) > 1e-3)[~is_whole].all()
    assert_all_close([alone[is_whole]], [y[is_whole]])
    unbounded, _ = layer(x, make_execution(layer, capacity=Capacity.unbounded()))
    assert_all_close([alone], [unbounded])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bad_logits_are_an_error_with_layer_and_count(config: MoEConfig, bad: float) -> None:
    layer, x = make_layer(config), make_x()
    x[[2, 5, 11], 0] = bad
    with pytest.raises(
        RoutingError, match="layer 7: router logits are NaN or Inf for 3 of 13 tokens; look for NaN"
    ):
        layer(x)


def test_a_sum_that_overflows_is_no_error() -> None:
    layer = make_layer(CONFIGS["top-3"], torch.float32)
    with torch.no_grad():
        layer.router.weight_ED.fill_(1.0)
    x = torch.full((64, 8), 1e37)
    x[0] = 0.0
    layer(x, make_execution(layer))


def test_the_check_can_be_switched_off() -> None:
    layer, x = make_layer(CONFIGS["top-3"]), make_x()
    x[3] = float("nan")
    y, _ = layer(x, make_execution(layer, checks_logits=False))
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4]].isfinite().all()


def test_integers_are_an_error() -> None:
    with pytest.raises(
        ShapeError, match=r"x must be floating point, got torch.int64; embed or cast it first"
    ):
        make_layer(CONFIGS["top-3"])(torch.zeros(3, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 7}, r"top_k \(7\) must be between 1 and num_experts \(6\)"),
        ({"num_groups": 4}, r"num_experts \(6\) must be divisible by the number of expert groups \(4\)"),
        (
            {"min_score": 0.1, "num_groups": 2},
            r"min_score \(0.1\) and num_groups \(2\) are two ways to choose",
        ),
        (
            {"min_score": 0.1, "capacity": Capacity.tutel(1.0)},
            r"min_score \(0.1\) .* capacity factor \(1.0\)",
        ),
        ({"min_score": 0.1, "top_k": 1}, r"min_score \(0.1\) has no effect with top_k \(1\)"),
        ({"min_score": 0.0}, r"min_score \(0.0\) must be between 0 and 1, .* every expert passes"),
        ({"min_score": -0.5}, r"min_score \(-0.5\) must be between 0 and 1"),
        ({"min_score": 1.0}, r"min_score \(1.0\) must be between 0 and 1, .* at 1 none does"),
        (
            {"min_score": 0.1, "bias_update_rate": 0.1},
            r"threshold \(min_score 0.1\) and a selection bias do not go together: .* drop min_score",
        ),
        ({"top_groups": 2}, r"top_groups \(2\) has no effect with num_groups \(1\)"),
        ({"num_groups": 0}, r"num_groups \(0\) must be at least 1"),
        ({"num_groups": -1}, r"num_groups \(-1\) must be at least 1"),
        (
            {"capacity": Capacity.deepspeed(3.0)},
            r"factor \(3.0\) can never drop anything: with 6 experts and top_k 2",
        ),
        ({"capacity": Capacity.tutel(3.5)}, r"factor \(3.5\) can never drop anything"),
        ({"shared_expert_gate": True}, "shared_expert_gate needs a shared expert"),
        ({"bias_update_rate": -0.1}, r"bias_update_rate \(-0.1\) must be at least 0"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        MoELayer(8, MoEConfig(**({"num_experts": NUM_EXPERTS, "top_k": 2, "intermediate_size": 4} | options)))  # type: ignore[arg-type]


def test_a_rate_beside_a_router_without_a_bias_is_an_error() -> None:
    config = MoEConfig(NUM_EXPERTS, 2, 4, bias_update_rate=0.1)
    with pytest.raises(
        RoutingError, match=r"bias_update_rate \(0.1\) has no effect on a router without a selection"
    ):
        MoELayer(8, config, router=TopKRouter(8, NUM_EXPERTS, 2))
    biased = Router(8, NUM_EXPERTS, TopK(2), has_selection_bias=True)
    assert MoELayer(8, config, router=biased).router is biased


def test_a_router_and_a_config_refuse_a_bias_on_a_threshold() -> None:
    with pytest.raises(
        RoutingError, match=r"threshold \(min_score 0.2\) and a selection bias do not go together"
    ):
        MoEConfig(NUM_EXPERTS, 3, 4, min_score=0.2, bias_update_rate=0.1)
    with pytest.raises(
        RoutingError, match=r"threshold \(min_score 0.2\) and a selection bias do not go together"
    ):
        Router(8, NUM_EXPERTS, Threshold(3, 0.2), has_selection_bias=True)
