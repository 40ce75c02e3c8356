"""The Routing: which expert gets which token with what weight. One per layer and micro-batch.

It is a flat, ragged list of assignments, ordered by token and within a token by choice. Dispatch, losses,
telemetry, predictors and placement all read this one record. It knows nothing of memory or network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.moe.choice import Choice


@dataclass(frozen=True)
class Routing:
    """A flat list of (token, expert, weight) assignments.

    expert_ids:     (assignments,) int64.
    weights:        (assignments,) float32, differentiable.
    token_offsets:  (tokens + 1,) int64: token t has the assignments [token_offsets[t], token_offsets[t + 1]).
    num_experts:    experts that could have been chosen.
    fixed_k:        the number of assignments where every token has the same, else None.
    dropped:        (assignments,) bool, True for one that is not computed; None when nothing is dropped.
    logits_TE:      (tokens, experts) float32, what the router saw; for balance losses and telemetry.
    scores_TE:      (tokens, experts) float32, the router's distribution: its scores, summing to one per token.
    is_finite:      whether all logits are finite, where the router's kernel has looked; None where nobody has.
    """

    expert_ids: Tensor
    weights: Tensor
    token_offsets: Tensor
    num_experts: int
    fixed_k: int | None = None
    dropped: Tensor | None = None
    logits_TE: Tensor | None = None
    scores_TE: Tensor | None = None
    is_finite: bool | None = None

    def __post_init__(self) -> None:
        if self.expert_ids.shape != self.weights.shape or self.expert_ids.ndim != 1:
            raise ShapeError(
                f"expert_ids {tuple(self.expert_ids.shape)} and weights {tuple(self.weights.shape)} must both be "
                "flat lists with one entry per assignment"
            )
        if self.fixed_k is not None and self.fixed_k * self.num_tokens != self.num_assignments:
            raise ShapeError(
                f"fixed_k ({self.fixed_k}) x tokens ({self.num_tokens}) must equal the number of assignments "
                f"({self.num_assignments})"
            )

    @property
    def num_tokens(self) -> int:
        return self.token_offsets.shape[0] - 1

    @property
    def num_assignments(self) -> int:
        return self.expert_ids.shape[0]

    @property
    def choice(self) -> Choice:
        """Which experts each token goes to, without the weights."""
        return Choice(self.expert_ids, self.token_offsets, self.fixed_k)

    def compute_token_ids(self) -> Tensor:
        """Returns (assignments,) int64: the token of each assignment."""
        return self.choice.compute_token_ids()

    def compute_expert_counts(self) -> Tensor:
        """Returns (experts,) int64: how many assignments each expert was chosen for, dropped ones included."""
        ids = self.expert_ids
        return ids.new_zeros(self.num_experts).scatter_add_(0, ids, torch.ones_like(ids))

    def compute_first_choice_counts(self) -> Tensor:
        """Returns (experts,) int64: of how many tokens each expert is the first choice, dropped ones included."""
        is_first = (self.choice.compute_ranks() == 0).long()
        return is_first.new_zeros(self.num_experts).scatter_add_(0, self.expert_ids, is_first)

    def count_dropped(self) -> int:
        """Returns how many assignments are not computed."""
        return 0 if self.dropped is None else int(self.dropped.sum())
