"""What a cache of experts would have done for recorded routing: by size and policy, and with which guesses.

Plain arithmetic on a `RoutingLog`; reads no weights and measures no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moesys.moe.prediction_score import PredictionScore, ScoredPredictor
from moesys.moe.predictors import LastIteration, NextLayer, Predictor, SamplePaths
from moesys.moe.routing_log import RoutingLog
from moesys.store.policy import PolicyName, make_policy
from moesys.store.replay import ReplayedSlots, ReplayResult, replay, replay_best

BEST = "belady"
"""The curve that no policy can better."""


@dataclass(frozen=True)
class MissCurve:
    """What one policy loads in caches of several sizes.

    name:    of a `PolicyName`, or `BEST`.
    points:  by size.
    """

    name: str
    points: tuple[ReplayResult, ...]


def compute_miss_curves(log: RoutingLog, sizes: Sequence[int]) -> list[MissCurve]:
    """Replays a log against every policy, the best possible one first.

    sizes: numbers of slots. Raises `ShapeError` for one below 1.
    """
    demands = list(log.demands())
    best = MissCurve(BEST, tuple(replay_best(demands, size) for size in sizes))
    return [best, *(_compute_curve(name, demands, sizes) for name in PolicyName)]


def _compute_curve(name: PolicyName, demands: Sequence[Sequence[object]], sizes: Sequence[int]) -> MissCurve:
    return MissCurve(name.value, tuple(replay(demands, make_policy(name), size) for size in sizes))


PREDICTORS: Mapping[str, Callable[[RoutingLog], Predictor]] = {
    "next-layer": lambda log: NextLayer(log.num_experts),
    "last-iteration": lambda log: LastIteration(log.layer_ids),
    "sample-paths": lambda log: SamplePaths(log.num_experts),
}
"""Those that need nothing but routing, made for the layers of a log; they learn as they go."""


def score_predictors(log: RoutingLog, num_slots: int, policy: PolicyName) -> dict[str, PredictionScore]:
    """Returns how well each of `PREDICTORS` would have guessed what a cache without guesses had to load."""
    slots = ReplayedSlots(make_policy(policy), num_slots)
    scored = {name: ScoredPredictor(make(log), slots.is_here) for name, make in PREDICTORS.items()}
    demands = iter(log.demands())
    for step in range(log.num_steps):
        for layer_id in log.layer_ids:
            routing = log.get_routing(step, layer_id)
            for predictor in scored.values():
                predictor.observe(layer_id, routing, None)
            slots.serve(next(demands))
            for predictor in scored.values():
                predictor.guess(layer_id)
    return {name: predictor.score for name, predictor in scored.items()}
