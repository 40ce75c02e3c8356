"""The study of recorded routing is the replay of its demands, with guesses held against what was missing."""

from __future__ import annotations

import pytest
import torch

from moesys.errors import ShapeError
from moesys.moe.cache_study import BEST, PREDICTORS, compute_miss_curves, score_predictors
from moesys.moe.routing_log import RoutingLog
from moesys.store import LeastRecent
from moesys.store.policy import PolicyName
from moesys.store.replay import replay, replay_best


def make_log(num_tokens: int = 60) -> RoutingLog:
    """Two layers whose tokens take turns between two pairs of experts; the second follows the first."""
    pairs = [[0, 1], [2, 3]]
    first = torch.tensor([pairs[token // 3 % 2] for token in range(num_tokens)], dtype=torch.int16)
    return RoutingLog({0: first, 1: first + 2}, {0: 6, 1: 6}, torch.arange(num_tokens + 1))


def test_curves_are_replays_and_the_best_comes_first() -> None:
    log = make_log()
    demands = list(log.demands())
    curves = compute_miss_curves(log, [3, 5, 12])
    assert [curve.name for curve in curves] == [BEST, *(name.value for name in PolicyName)]
    by_name = {curve.name: curve.points for curve in curves}
    assert by_name[BEST] == tuple(replay_best(demands, size) for size in (3, 5, 12))
    assert by_name["lru"] == tuple(replay(demands, LeastRecent(), size) for size in (3, 5, 12))
    assert {points[-1].num_loads for points in by_name.values()} == {8}
    with pytest.raises(ShapeError, match="at least 1 slot"):
        compute_miss_curves(log, [0])


def test_guesses_are_held_against_what_the_cache_lacks() -> None:
    log = make_log()
    scores = score_predictors(log, 4, PolicyName.LRU)
    assert set(scores) == set(PREDICTORS)
    misses = replay(list(log.demands()), LeastRecent(), 4).num_loads
    in_layer_1 = misses // 2
    paths, everything = scores["sample-paths"], scores["next-layer"]
    assert {score.num_missing for score in scores.values()} == {misses}
    assert paths.precision == 1.0
    assert paths.num_right == in_layer_1 - 4, "each pair is new once"
    assert everything.num_right == misses - 2, "all but the first layer of the first token"
    assert everything.precision < 0.5
    assert scores["last-iteration"].num_right == 0, "what was needed last is still there"


def test_with_everything_in_memory_nothing_is_guessed_in_vain() -> None:
    for score in score_predictors(make_log(), 12, PolicyName.LRFU).values():
        assert score.num_missing == 8
        assert score.recall <= 1
