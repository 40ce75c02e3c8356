"""From logits to scores: the first of the three parts of a router."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


class Score(StrEnum):
    """How a router's logits become scores."""

    SOFTMAX = "softmax"
    """Experts compete: the scores of a token sum to one (Shazeer et al., arXiv 1701.06538)."""
    SIGMOID = "sigmoid"
    """Each expert is judged alone, in (0, 1) (DeepSeek-V3, arXiv 2412.19437, equation 15)."""


def compute_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """Returns (tokens, experts) scores of logits, in their dtype."""
    return logits_TE.softmax(dim=-1) if score is Score.SOFTMAX else logits_TE.sigmoid()


def compute_distribution(scores_TE: Tensor, score: Score) -> Tensor:
    """Returns (tokens, experts): the scores scaled to sum to one per token, for balance losses and telemetry."""
    if score is Score.SOFTMAX:
        return scores_TE
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores_TE.dtype).tiny)
