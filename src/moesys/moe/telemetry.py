"""How evenly experts are used: counts and router statistics, gathered from the same Routing that computed.

Counted once per token, because it reads the routings that a forward pass returns: recomputation returns none. A token
whose distribution is NaN, as where logits go unchecked, is counted where it was sent and enters no mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesys.moe.layers import find_layers
from moesys.moe.routing import Routing


@dataclass(frozen=True)
class ExpertLoad:
    """What the routers did over some steps. Lists have one entry per MoE layer, in the order of ``layer_ids``."""

    layer_ids: list[int]
    expert_tokens: list[list[int]]
    """Assignments given to each expert."""
    imbalance: float
    """Largest over mean load of an expert, averaged over layers; 1 is even."""
    entropy: float
    """Entropy of the router's distribution over ln E, averaged over tokens and layers; 1 is undecided. 0 for a layer
    that has no token with a finite distribution."""
    confidence: float
    """Largest share in the router's distribution, averaged likewise. It is the first choice's, unless a bias or a given
    choice put another expert first."""
    dropped: int
    """Assignments that were not computed."""


class LoadMeter:
    """Adds up routings until they are read; works on the device and looks at nothing before `drain`."""

    def __init__(self, model: nn.Module | None = None) -> None:
        """model: whose layers are metered, to make sure of their ids; None where somebody else has. Raises
        `RoutingError` when two of its MoE layers have the same id, so that their counts would be one."""
        if model is not None:
            find_layers(model)
        self._reset()

    def _reset(self) -> None:
        self._counts: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._dropped: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, routings: Mapping[int, Routing]) -> None:
        """Adds the routings of one forward pass, by layer."""
        for layer_id, routing in routings.items():
            counts, sums = routing.compute_expert_counts(), _sum_statistics(routing)
            if layer_id in self._counts:
                self._counts[layer_id] += counts
                self._sums[layer_id] += sums
            else:
                self._counts[layer_id], self._sums[layer_id] = counts, sums
            if routing.dropped is not None:
                self._dropped[layer_id] = self._dropped.get(layer_id, 0) + routing.dropped.sum()

    def drain(self) -> ExpertLoad:
        """Returns what was added since the last call and starts anew."""
        layer_ids = sorted(self._counts)
        counts = [self._counts[i].tolist() for i in layer_ids]
        means = [(self._sums[i][:2] / self._sums[i][2].clamp_min(1)).tolist() for i in layer_ids]
        load = ExpertLoad(
            layer_ids=layer_ids,
            expert_tokens=counts,
            imbalance=_mean([max(c) * len(c) / max(1, sum(c)) for c in counts]),
            entropy=_mean([entropy for entropy, _ in means]),
            confidence=_mean([confidence for _, confidence in means]),
            dropped=sum(int(count) for count in self._dropped.values()),
        )
        self._reset()
        return load


def _sum_statistics(routing: Routing) -> Tensor:
    """Returns (3,) float32 over the tokens with a finite distribution: the sums of entropy / ln E and of the largest
    share, and how many they are."""
    if routing.scores_TE is None:
        return torch.zeros(3, device=routing.expert_ids.device)
    scores_TE = routing.scores_TE
    entropy_T = -torch.special.xlogy(scores_TE, scores_TE).sum(dim=-1) / math.log(max(2, routing.num_experts))
    is_finite_T = entropy_T.isfinite()
    statistics_3T = torch.stack([entropy_T, scores_TE.amax(dim=-1), torch.ones_like(entropy_T)])
    return torch.where(is_finite_T, statistics_3T, 0.0).sum(dim=1).float()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
