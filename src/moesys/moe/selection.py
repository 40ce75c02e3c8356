"""From scores to chosen experts: the second of the three parts of a router.

A selection is a small frozen record with one method. It sees scores only, after the selection bias where there is
one, and knows nothing of logits or weights. Ties go to the lower expert id. New rules are new records.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from moesys.errors import RoutingError
from moesys.kernels import routing as routing_kernels
from moesys.moe.choice import Choice


class Selection(Protocol):
    """Chooses experts for each token. Implementations are frozen dataclasses, so that k can be replaced."""

    @property
    def k(self) -> int:
        """The most experts that a token gets."""
        ...

    def require_possible(self, num_experts: int) -> None:
        """Raises `RoutingError` when the rule cannot be applied to this many experts."""
        ...

    def choose(self, scores_TE: Tensor) -> Choice:
        """Chooses from (tokens, experts) scores without gradient, best first."""
        ...

    def with_k(self, k: int) -> Selection:
        """Returns the same rule with another k."""
        ...


@dataclass(frozen=True)
class TopK:
    """The k experts with the largest scores. With k = 1 this is Switch routing (arXiv 2101.03961)."""

    k: int

    def require_possible(self, num_experts: int) -> None:
        """See `Selection`."""
        _require_k(self.k, num_experts)

    def choose(self, scores_TE: Tensor) -> Choice:
        """See `Selection`."""
        return Choice.from_table(choose_top_k(scores_TE, self.k))

    def with_k(self, k: int) -> TopK:
        """See `Selection`."""
        return replace(self, k=k)


class GroupScore(StrEnum):
    """What a group of experts competes with."""

    TOP_2_SUM = "top_2_sum"
    """The sum of its two best experts' scores (DeepSeek-V3)."""
    MAX = "max"
    """Its best expert's score (DeepSeek-V2, arXiv 2405.04434, section 2.2.2)."""


@dataclass(frozen=True)
class GroupLimitedTopK:
    """The k best experts within the best groups.

    Groups are equal runs of expert ids. ``num_groups`` of them compete for ``top_groups`` places, which bounds the
    devices that a token visits when a group lies on one device. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """

    k: int
    num_groups: int
    top_groups: int
    group_score: GroupScore = GroupScore.TOP_2_SUM

    def require_possible(self, num_experts: int) -> None:
        """See `Selection`."""
        _require_k(self.k, num_experts)
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise RoutingError(
                f"num_experts ({num_experts}) must be divisible by the number of expert groups ({self.num_groups}); "
                f"try {', '.join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)}"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise RoutingError(
                f"the groups that a token may use ({self.top_groups}) must be between 1 and the number of groups "
                f"({self.num_groups})"
            )
        reachable = self.top_groups * (num_experts // self.num_groups)
        if self.k > reachable:
            raise RoutingError(
                f"top_k ({self.k}) must not exceed the {reachable} experts of {self.top_groups} of {self.num_groups} "
                "groups; lower top_k or let a token use more groups"
            )

    def choose(self, scores_TE: Tensor) -> Choice:
        """See `Selection`."""
        scores_TGN = scores_TE.unflatten(1, (self.num_groups, -1))
        num_counted = 1 if self.group_score is GroupScore.MAX else min(2, scores_TGN.shape[2])
        group_scores_TG = scores_TGN.topk(num_counted, dim=2).values.sum(dim=2)
        group_ids = choose_top_k(group_scores_TG, self.top_groups)
        is_open_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter_(1, group_ids, True)
        open_TE = scores_TGN.masked_fill(~is_open_TG.unsqueeze(2), -torch.inf).flatten(1)
        return Choice.from_table(choose_top_k(open_TE, self.k))

    def with_k(self, k: int) -> GroupLimitedTopK:
        """See `Selection`."""
        return replace(self, k=k)


@dataclass(frozen=True)
class Threshold:
    """Top-any: every expert whose score reaches ``min_score``, at least the best one and at most the k best.

    Tokens get different numbers of experts, so the choice is ragged and its size is known after looking at it. It does
    not go with a selection bias; see `require_unbiased_threshold`.
    """

    k: int
    min_score: float

    def require_possible(self, num_experts: int) -> None:
        """See `Selection`."""
        _require_k(self.k, num_experts)

    def choose(self, scores_TE: Tensor) -> Choice:
        """See `Selection`."""
        ids_TK = choose_top_k(scores_TE, self.k)
        passes_TK = scores_TE.gather(1, ids_TK) >= self.min_score
        passes_TK[:, 0] = True
        counts_T = passes_TK.sum(dim=1)
        return Choice(ids_TK[passes_TK], torch.cat([counts_T.new_zeros(1), counts_T.cumsum(0)]))

    def with_k(self, k: int) -> Threshold:
        """See `Selection`."""
        return replace(self, k=k)


def require_unbiased_threshold(selection: Selection, *, has_bias: bool) -> None:
    """Raises `RoutingError` for a `Threshold` under a selection bias that balances the experts.

    Biases settle because moving them far enough evens the load at k experts per token. Under a threshold they drift: if
    biased scores had to pass, each bias would also change how many experts a token gets; if unbiased ones, no bias
    could help an expert that rarely passes, and its own would grow until it always came first.
    """
    if has_bias and isinstance(selection, Threshold):
        raise RoutingError(
            f"a threshold (min_score {selection.min_score}) and a selection bias do not go together: the bias would "
            "drift instead of balancing the experts; drop min_score, or drop the bias (bias_update_rate) and use a "
            "balance loss"
        )


def choose_top_k(scores_TE: Tensor, top_k: int) -> Tensor:
    """Returns (tokens, k) int64: the experts with the largest scores, best first; ties go to the lower expert id."""
    if routing_kernels.takes(scores_TE):
        return routing_kernels.choose_top_k(scores_TE, top_k)
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def _require_k(k: int, num_experts: int) -> None:
    if not 1 <= k <= num_experts:
        raise RoutingError(
            f"top_k ({k}) must be between 1 and num_experts ({num_experts}); lower top_k or add experts"
        )
