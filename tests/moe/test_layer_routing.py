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
    Choice,
    Execution,
    LoadMeter,
    LocalDispatcher,
    MoEConfig,
    MoELayer,
    ResidentSource,
    RoutingTape,
)


def make_execution(layer: MoELayer, **options: object) -> Execution:
    return Execution(LocalDispatcher(), ResidentSource({LAYER: layer.experts}), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 2, NUM_EXPERTS])
def test_k_per_call(k: int) -> None:
    layer = make_layer(CONFIGS["top-3"])
    expected = make_layer(MoEConfig(NUM_EXPERTS, k, 4))
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


def test_drops_are_zero_counted_and_seen_by_the_meter() -> None:
    layer, x = make_layer(MoEConfig(NUM_EXPERTS, 1, 4, normalize_top_k=False)), make_x()
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
    if config.capacity is not None:
        return
    layer, x = make_layer(config), make_x()
    y, _ = layer(x)
    alone = torch.cat([layer(x[i : i + 1])[0] for i in range(13)])
    assert_all_close([alone], [y])


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
        ({"shared_expert_gate": True}, "shared_expert_gate needs a shared expert"),
        ({"bias_update_rate": -0.1}, r"bias_update_rate \(-0.1\) must be at least 0"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        MoELayer(8, MoEConfig(**({"num_experts": NUM_EXPERTS, "top_k": 2, "intermediate_size": 4} | options)))  # type: ignore[arg-type]
