"""Losses that keep the experts evenly used and the router's logits small. They read nothing but a Routing.

Each says the scope of its statistics. A loss over the tokens of several ranks takes their counts as an argument, so
that whoever knows the ranks can sum them up in between. No loss has the scope ``step``: its counts are known after the
last micro-batch, when the others have been differentiated; only `BiasBalancer` uses them.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.moe.routing import Routing


class BalanceScope(StrEnum):
    """Over which tokens a balance loss wants experts evenly used."""

    MICRO_BATCH = "micro_batch"
    """All tokens of a forward pass: `compute_balance_loss`."""
    SEQUENCE = "sequence"
    """The tokens of each sequence by itself: `compute_sequence_balance_loss`."""


def compute_balance_loss(routing: Routing, counts_E: Tensor | None = None) -> Tensor:
    """Computes E * sum_e f_e * P_e, a float32 scalar that is 1 when every expert is equally used.

    f_e is the share of assignments that chose expert e (no gradient), P_e the mean score of e over the tokens.
    Source: Switch Transformer, arXiv 2101.03961, equation 4, with shares over all k choices, as DeepSpeed computes it
    for k of 3 and more. For k = 1 it is also `compute_first_choice_balance_loss`.

    counts_E: (experts,) assignments per expert over the scope of f. By default those of this Routing: scope
    ``micro_batch`` where it holds all tokens of the forward pass. With the summed counts of all ranks this is the
    global-batch loss (arXiv 2501.11873): f has that scope, P_e that of the Routing, and the mean over Routings by their
    tokens is the loss over all of them.
    """
    return _compute_loss(routing, routing.compute_expert_counts() if counts_E is None else counts_E)


def compute_first_choice_balance_loss(routing: Routing, counts_E: Tensor | None = None) -> Tensor:
    """Computes E * sum_e f_e * P_e with f_e the share of tokens whose first choice is expert e, a float32 scalar that
    is 1 when every expert is equally often first. It asks nothing of the second and later choices.

    Source: GShard, arXiv 2006.16668, algorithm 1, as Tutel computes it for any k and DeepSpeed for k = 1 and 2.

    counts_E: (experts,) tokens whose first choice is each expert, as in `compute_balance_loss`.
    """
    return _compute_loss(routing, routing.compute_first_choice_counts() if counts_E is None else counts_E)


def _compute_loss(routing: Routing, counts_E: Tensor) -> Tensor:
    scores_TE = _require(routing.scores_TE, "scores_TE")
    share_E = counts_E.to(scores_TE.dtype) / counts_E.sum().clamp_min(1)
    return routing.num_experts * (share_E * scores_TE.sum(dim=0)).sum() / max(1, routing.num_tokens)


def compute_sequence_balance_loss(routing: Routing, num_sequences: int) -> Tensor:
    """Computes the balance loss of each sequence by itself and returns the mean, a float32 scalar.

    The tokens are ``num_sequences`` sequences of equal length, one after the other. Scope: ``sequence``.
    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20, with f counting the experts that were chosen, bias
    included. Raises `ShapeError` when the tokens cannot be cut evenly.
    """
    scores_TE = _require(routing.scores_TE, "scores_TE")
    if num_sequences < 1 or routing.num_tokens % num_sequences:
        raise ShapeError(
            f"the {routing.num_tokens} tokens of the Routing must be {num_sequences} sequences of equal length; give "
            "the number of rows of the batch"
        )
    num_experts, length = routing.num_experts, max(1, routing.num_tokens // num_sequences)
    cells = routing.compute_token_ids() // length * num_experts + routing.expert_ids
    counts_SE = cells.new_zeros(num_sequences * num_experts).scatter_add_(0, cells, torch.ones_like(cells))
    counts_SE = counts_SE.view(num_sequences, num_experts)
    share_SE = counts_SE.to(scores_TE.dtype) / counts_SE.sum(dim=1, keepdim=True).clamp_min(1)
    mean_scores_SE = scores_TE.view(num_sequences, -1, num_experts).sum(dim=1) / length
    return num_experts * (share_SE * mean_scores_SE).sum() / num_sequences


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
