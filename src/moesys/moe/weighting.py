"""From the chosen experts to their weights: the third of the three parts of a router."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from moesys.moe.choice import Choice

_SMALLEST_SUM = 1e-20
"""Below it scores are underflows (a bias may choose such experts): a weight of about zero instead of NaN."""


class Normalization(StrEnum):
    """Whether and how the weights of a token's chosen experts are made to sum to one."""

    NONE = "none"
    """The weight is the score (Switch, OLMoE)."""
    AFTER = "after"
    """Scores are divided by the sum over the chosen experts (Mixtral, Qwen3-MoE, DeepSeek-V3)."""
    BEFORE = "before"
    """Softmax over the chosen experts' logits (gpt-oss); with softmax scores the same numbers as ``after``."""


def compute_weights(
    choice: Choice, logits_TE: Tensor, scores_TE: Tensor, normalization: Normalization
) -> Tensor:
    """Returns (assignments,) weights in the dtype of the scores, differentiable in logits and scores."""
    match normalization:
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


def _divide_by_sum(choice: Choice, values_A: Tensor) -> Tensor:
    return values_A / choice.sum_per_token(values_A).clamp_min(_SMALLEST_SUM)


def _find_largest_per_token(choice: Choice, values_A: Tensor) -> Tensor:
    token_ids = choice.compute_token_ids()
    lowest = values_A.new_full((choice.num_tokens,), -torch.inf)
    return lowest.scatter_reduce(0, token_ids, values_A, "amax")[token_ids]
