"""What the expert operator is given: rows, a bank view, and where the results go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Tokens on this device, and which of them each local expert computes.

    x_RD:     (rows, hidden) activations, each row once.
    row_ids:  (assignments,) int64, grouped by local expert: the row of ``x_RD`` that feeds each assignment.
    offsets:  (experts + 1,) int64: expert e computes the assignments [offsets[e], offsets[e + 1]).
    """

    x_RD: Tensor
    row_ids: Tensor
    offsets: Tensor

    @property
    def num_assignments(self) -> int:
        return self.row_ids.shape[0]

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0] - 1


@dataclass(frozen=True)
class BankView:
    """Weights of some or all local experts of a layer, in the slots where they lie.

    gate_up_SFD:     (slots, 2 * inner, hidden): the gate projection's rows, then the up projection's.
    down_SDF:        (slots, hidden, inner).
    slot_of_expert:  (experts,) int64, -1 for an expert that is not in this view; None when slot e holds
                     expert e for every expert, which needs no look at the routing.
    """

    gate_up_SFD: Tensor
    down_SDF: Tensor
    slot_of_expert: Tensor | None = None

    @property
    def covers_all(self) -> bool:
        """Whether the view is a constant that holds every expert."""
        return self.slot_of_expert is None

    def compute_slots(self) -> list[int]:
        """Returns the slot of each expert on the host; -1 where the view does not hold it."""
        if self.slot_of_expert is None:
            return list(range(self.gate_up_SFD.shape[0]))
        return self.slot_of_expert.tolist()


@dataclass(frozen=True)
class TokenSum:
    """Which assignments sum up to which row, in the order of the token's choices.

    positions:  (assignments,) int64, grouped by row of the result: places in the order of ``Rows.row_ids``.
    offsets:    (results + 1,) int64: row r sums the positions [offsets[r], offsets[r + 1]).
    """

    positions: Tensor
    offsets: Tensor

    @property
    def num_results(self) -> int:
        return self.offsets.shape[0] - 1

    def compute_result_ids(self, num_assignments: int) -> Tensor:
        """Returns (num_assignments,) int64: the row of the result that each assignment, in `Rows` order, adds to;
        0 for one that is not part of any sum."""
        counts = self.offsets.diff()
        by_choice = torch.repeat_interleave(
            torch.arange(self.num_results, device=counts.device), counts, output_size=self.positions.shape[0]
        )
        return self.positions.new_zeros(num_assignments).scatter_(0, self.positions, by_choice)
