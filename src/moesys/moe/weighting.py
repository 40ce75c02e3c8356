"""From the chosen experts to their weights: the third of the three parts of a router."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from moesys.errors import RoutingError
from moesys.kernels import routing as routing_kernels
from moesys.moe.choice import Choice

SMALLEST_SUM = 1e-20
"""Below it scores are underflows (a bias may choose such experts): a weight of about zero instead of NaN."""


class Normalization(StrEnum):
    """Whether and how the weights of a token's chosen experts are made to sum to one."""

    NONE = "none"
    """The weight is the score (Switch, OLMoE)."""
    AFTER = "after"
    """Scores are divided by the sum over the chosen experts (Mixtral, Qwen3-MoE, DeepSeek-V3)."""
    BEFORE = "before"
    """Softmax over the chosen experts' logits (gpt-oss); with softmax scores the same numbers as ``after``."""


@dataclass(frozen=True)
class SparseMixer:
    """Each chosen expert's weight is its softmax among the experts that come close to it (PhiMoE, arXiv 2409.12136).

    For a token's best, then its next expert, the earlier ones left out: experts whose logit s is further below the
    chosen one's m than (m - s) / max(|s|, m) = 2 * epsilon are dropped, and the softmax is taken over the others.
    Nothing is random here: training uses the weights of inference.
    """

    epsilon: float


Weighting = Normalization | SparseMixer
"""How weights come from a token's choice."""


def compute_weights(choice: Choice, logits_TE: Tensor, scores_TE: Tensor, weighting: Weighting) -> Tensor:
    """Returns (assignments,) weights in the dtype of the scores, differentiable in logits and scores.

    Raises `RoutingError` for a `SparseMixer` where tokens have different numbers of experts.
    """
    match weighting:
        case SparseMixer(epsilon=epsilon):
            return _mix_sparsely(choice, logits_TE, epsilon)
        case Normalization.NONE | Normalization.AFTER if routing_kernels.takes(
            scores_TE, choice.expert_ids, choice.token_offsets
        ):
            smallest_sum = SMALLEST_SUM if weighting is Normalization.AFTER else None
            return routing_kernels.weigh_choice(
                scores_TE, choice.expert_ids, choice.token_offsets, smallest_sum
            )
        case Normalization.NONE:
            return choice.gather(scores_TE)
        case Normalization.AFTER:
            return _divide_by_sum(choice, choice.gather(scores_TE))
        case Normalization.BEFORE:
            # Any shift per token is right; the largest chosen logit is the one that cannot overflow or vanish.
            logits_A = choice.gather(logits_TE)
            return _divide_by_sum(
                choice, (logits_A - _find_largest_per_token(choice, logits_A.detach())).exp()
            )


def _mix_sparsely(choice: Choice, logits_TE: Tensor, epsilon: float) -> Tensor:
    if choice.fixed_k is None:
        raise RoutingError("a SparseMixer weighs a fixed number of experts per token; use TopK")
    weights, left_TE = [], logits_TE
    for ids_T1 in choice.expert_ids.view(-1, choice.fixed_k).split(1, dim=1):
        chosen_T1 = left_TE.gather(1, ids_T1)
        is_far_TE = (chosen_T1 - left_TE) / torch.maximum(logits_TE.abs(), chosen_T1) > 2 * epsilon
        weights.append(left_TE.masked_fill(is_far_TE, -torch.inf).softmax(dim=1).gather(1, ids_T1))
        left_TE = left_TE.scatter(1, ids_T1, -torch.inf)
    return torch.cat(weights, dim=1).flatten()


def _divide_by_sum(choice: Choice, values_A: Tensor) -> Tensor:
    return values_A / choice.sum_per_token(values_A).clamp_min(SMALLEST_SUM)


def _find_largest_per_token(choice: Choice, values_A: Tensor) -> Tensor:
    token_ids = choice.compute_token_ids()
    lowest = values_A.new_full((choice.num_tokens,), -torch.inf)
    return lowest.scatter_reduce(0, token_ids, values_A, "amax")[token_ids]
