"""Losses that keep the experts evenly used and the router's logits small. They read nothing but a Routing.

Scope: ``micro_batch``, all tokens of one forward pass, which are the tokens of the Routing given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.moe.routing import Routing


def compute_balance_loss(routing: Routing) -> Tensor:
    """Computes E * sum_e f_e * P_e, a float32 scalar that is 1 when every expert is equally used.

    f_e is the share of assignments that chose expert e (no gradient), P_e the mean score of e over the tokens.
    Source: Switch Transformer, arXiv 2101.03961, equation 4, with shares over all k choices.
    """
    scores_TE = _require(routing.scores_TE, "scores_TE")
    share_E = routing.compute_expert_counts().to(scores_TE.dtype) / max(1, routing.num_assignments)
    return routing.num_experts * (share_E * scores_TE.sum(dim=0)).sum() / max(1, routing.num_tokens)


def compute_router_z_loss(routing: Routing) -> Tensor:
    """Computes the mean over tokens of logsumexp(logits)^2, a float32 scalar.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    logits_TE = _require(routing.logits_TE, "logits_TE")
    return torch.logsumexp(logits_TE, dim=-1).square().sum() / max(1, routing.num_tokens)


def _require(statistics: Tensor | None, name: str) -> Tensor:
    if statistics is None:
        raise ShapeError(f"this loss needs a Routing with {name}; it was made by a router that keeps none")
    return statistics
