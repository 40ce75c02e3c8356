"""The Routing: which expert gets which token with what weight. One per layer and micro-batch.

It is a flat, ragged list of assignments, ordered by token and within a token by choice. Dispatch, losses,
telemetry, predictors and placement all read this one record. It knows nothing of memory or network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesys.errors import ShapeError


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
    scores_TE:      (tokens, experts) float32, the scores that the weights come from.
    """

    expert_ids: Tensor
    weights: Tensor
    token_offsets: Tensor
    num_experts: int
    fixed_k: int | None = None
    dropped: Tensor | None = None
    logits_TE: Tensor | None = None
    scores_TE: Tensor | None = None

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

    def compute_token_ids(self) -> Tensor:
        """Returns (assignments,) int64: the token of each assignment."""
        tokens = torch.arange(self.num_tokens, device=self.expert_ids.device)
        repeats = self.token_offsets.diff() if self.fixed_k is None else self.fixed_k
        if isinstance(repeats, int):
            return tokens.repeat_interleave(repeats)
        return torch.repeat_interleave(tokens, repeats, output_size=self.num_assignments)

    def compute_expert_counts(self) -> Tensor:
        """Returns (experts,) int64: how many assignments each expert was chosen for, dropped ones included."""
        ids = self.expert_ids
        return ids.new_zeros(self.num_experts).scatter_add_(0, ids, torch.ones_like(ids))

    def count_dropped(self) -> int:
        """Returns how many assignments are not computed."""
        return 0 if self.dropped is None else int(self.dropped.sum())


@dataclass
class RoutingTape:
    """The choices of one block in one micro-batch: recorded in the forward pass, replayed when it is recomputed.

    Recomputing the router can flip near-tied choices, which would give the backward pass other experts than the
    forward pass had. Only the choice of experts is replayed; logits and weights are computed again, with gradients.
    """

    _expert_ids_TK: Tensor | None = field(default=None, init=False)
    _is_replaying: bool = field(default=False, init=False)

    @property
    def replayed_expert_ids(self) -> Tensor | None:
        """(tokens, k) int64 to be used instead of choosing; None while recording."""
        return self._expert_ids_TK if self._is_replaying else None

    def record(self, expert_ids_TK: Tensor) -> None:
        """Keeps the choice of the forward pass; does nothing while replaying."""
        if not self._is_replaying:
            self._expert_ids_TK = expert_ids_TK

    def make_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Returns the contexts for forward and recompute that `torch.utils.checkpoint` asks for."""
        return nullcontext(), self._replay()

    @contextmanager
    def _replay(self) -> Iterator[None]:
        self._is_replaying = True
        try:
            yield
        finally:
            self._is_replaying = False
