"""Which experts each token goes to, before any weight is known. Selections make it, weightings and tapes read it.

A flat, ragged list ordered by token and within a token from the best choice down. It knows nothing of scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import RoutingError


@dataclass(frozen=True)
class Choice:
    """A flat list of (token, expert).

    expert_ids:     (assignments,) int64.
    token_offsets:  (tokens + 1,) int64: token t has the assignments [token_offsets[t], token_offsets[t + 1]).
    fixed_k:        the number of assignments where every token has the same, else None.
    """

    expert_ids: Tensor
    token_offsets: Tensor
    fixed_k: int | None = None

    @classmethod
    def from_table(cls, expert_ids_TK: Tensor) -> Choice:
        """Makes the choice in which every token has the k experts of its row, best first.

        expert_ids_TK: (tokens, k) int64. Raises `RoutingError` for another shape or dtype.
        """
        if expert_ids_TK.ndim != 2 or expert_ids_TK.dtype != torch.int64:
            raise RoutingError(
                f"expert ids must be a (tokens, k) table of int64, got {expert_ids_TK.dtype} of shape "
                f"{tuple(expert_ids_TK.shape)}; use ids.long().view(-1, k)"
            )
        num_tokens, k = expert_ids_TK.shape
        offsets = torch.arange(num_tokens + 1, device=expert_ids_TK.device) * k
        return cls(expert_ids_TK.reshape(-1), offsets, fixed_k=k)

    @property
    def num_tokens(self) -> int:
        return self.token_offsets.shape[0] - 1

    @property
    def num_assignments(self) -> int:
        return self.expert_ids.shape[0]

    def compute_token_ids(self) -> Tensor:
        """Returns (assignments,) int64: the token of each assignment."""
        tokens = torch.arange(self.num_tokens, device=self.expert_ids.device)
        if self.fixed_k is not None:
            return tokens.repeat_interleave(self.fixed_k)
        return torch.repeat_interleave(tokens, self.token_offsets.diff(), output_size=self.num_assignments)

    def compute_ranks(self) -> Tensor:
        """Returns (assignments,) int64: 0 for a token's first choice, 1 for its second, and so on."""
        places = torch.arange(self.num_assignments, device=self.expert_ids.device)
        return places - self.token_offsets[self.compute_token_ids()]

    def gather(self, values_TE: Tensor) -> Tensor:
        """Returns (assignments,): the entry of each assignment in a (tokens, experts) table, differentiable."""
        if self.fixed_k is not None:
            return values_TE.gather(1, self.expert_ids.view(-1, self.fixed_k)).reshape(-1)
        return values_TE[self.compute_token_ids(), self.expert_ids]

    def sum_per_token(self, values_A: Tensor) -> Tensor:
        """Returns (assignments,): for each assignment the sum of the values of its token, in order of choice."""
        if self.fixed_k is not None:
            sums_T1 = values_A.view(-1, self.fixed_k).sum(dim=1, keepdim=True)
            return sums_T1.expand(-1, self.fixed_k).reshape(-1)
        token_ids = self.compute_token_ids()
        return values_A.new_zeros(self.num_tokens).index_add(0, token_ids, values_A)[token_ids]
