"""What the expert operator is given: rows, a bank view, and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from moesys.kernels.formats import Int8Weight

Weight = Tensor | Int8Weight
"""Stacked matrices in a format that kernels take: float32, bfloat16, float64 (reference) or int8 groups."""


class Activation(StrEnum):
    """What an expert does between its two products. ``up`` is what the first product gives."""

    SWIGLU = "swiglu"
    """silu(gate) * up (arXiv 2002.05202)."""
    CLAMPED_SWIGLU = "clamped_swiglu"
    """gate * sigmoid(alpha * gate) * (up + 1), gate clamped from above and up from both sides (gpt-oss)."""
    GELU = "gelu"
    """gelu(up), exact."""
    RELU = "relu"
    """max(up, 0)."""


@dataclass(frozen=True)
class ExpertForm:
    """The arithmetic of an expert: down @ activation(up @ x + bias) + bias.

    limit and alpha are read by ``clamped_swiglu`` only.
    """

    activation: Activation = Activation.SWIGLU
    limit: float = 7.0
    alpha: float = 1.702

    @property
    def is_gated(self) -> bool:
        """Whether the first product gives a gate and an up half."""
        return self.activation in (Activation.SWIGLU, Activation.CLAMPED_SWIGLU)

    @property
    def num_halves(self) -> int:
        """Rows of the first matrix per inner unit: 2 with a gate, else 1."""
        return 2 if self.is_gated else 1


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

    gate_up_SFD:      (slots, halves * inner, hidden): the gate's rows, then the up rows; without a gate only these.
    down_SDF:         (slots, hidden, inner), in the same format.
    slot_of_expert:   (experts,) int64, -1 for an expert that is not in this view; None when slot e holds
                      expert e for every expert, which needs no look at the routing.
    form:             the arithmetic between the products.
    gate_up_bias_SF:  (slots, halves * inner), in the dtype of the rows; None without biases.
    down_bias_SD:     (slots, hidden), likewise.
    """

    gate_up_SFD: Weight
    down_SDF: Weight
    slot_of_expert: Tensor | None = None
    form: ExpertForm = ExpertForm()
    gate_up_bias_SF: Tensor | None = None
    down_bias_SD: Tensor | None = None

    @property
    def covers_all(self) -> bool:
        """Whether the view is a constant that holds every expert."""
        return self.slot_of_expert is None

    @property
    def num_slots(self) -> int:
        return self.gate_up_SFD.shape[0]

    def compute_slots(self) -> list[int]:
        """Returns the slot of each expert on the host; -1 where the view does not hold it."""
        if self.slot_of_expert is None:
            return list(range(self.num_slots))
        return self.slot_of_expert.tolist()


@dataclass(frozen=True)
class ModuleView:
    """Experts that are functions of the user's own, such as `nn.Module`: (rows, hidden) to (rows, hidden).

    functions:       one per slot.
    slot_of_expert:  as in `BankView`.
    """

    functions: Sequence[Callable[[Tensor], Tensor]]
    slot_of_expert: Tensor | None = None

    @property
    def covers_all(self) -> bool:
        """Whether slot e holds expert e for every expert."""
        return self.slot_of_expert is None

    @property
    def num_slots(self) -> int:
        return len(self.functions)

    def compute_slots(self) -> list[int]:
        """Returns the slot of each expert on the host; -1 where the view does not hold it."""
        return list(range(self.num_slots)) if self.slot_of_expert is None else self.slot_of_expert.tolist()


@dataclass(frozen=True)
class Adapters:
    """Low-rank additions to the matrices of a bank (LoRA, arXiv 2106.09685), by local expert and not by slot.

    Each matrix W of expert e becomes W + scale * b[e] @ a[e].

    gate_up_a_ERD, gate_up_b_EFR:  (experts, rank, hidden) and (experts, halves * inner, rank).
    down_a_ERF, down_b_EDR:        (experts, rank, inner) and (experts, hidden, rank).
    """

    gate_up_a_ERD: Tensor
    gate_up_b_EFR: Tensor
    down_a_ERF: Tensor
    down_b_EDR: Tensor
    scale: float = 1.0


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
