"""How the parts of a slot make up the weights of an expert: the shapes of the parts, and the view that kernels read.

Knows formats of weights; knows nothing of files, caches or layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesys.kernels import BankView, ExpertForm
from moesys.store import PartShape


class SlotLayout(Protocol):
    """What one slot holds. Layers whose layouts are equal can share slots."""

    @property
    def part_shapes(self) -> tuple[PartShape, ...]:
        """Of one expert, in the order of the slot's parts."""
        ...

    def make_view(self, parts: Sequence[Tensor], slot_of_expert: Tensor) -> BankView:
        """Returns the experts that lie in slots.

        parts:           one tensor per part, (slots, *shape of the part).
        slot_of_expert:  as in `BankView`.
        """
        ...


@dataclass(frozen=True)
class PlainLayout:
    """Matrices as they are computed: gate_up, down, then both biases where there are any.

    inner_size: of the expert's hidden layer.
    """

    hidden_size: int
    inner_size: int
    dtype: torch.dtype
    form: ExpertForm = ExpertForm()
    has_bias: bool = False

    @property
    def part_shapes(self) -> tuple[PartShape, ...]:
        """See `SlotLayout`."""
        width = self.form.num_halves * self.inner_size
        shapes = [(width, self.hidden_size), (self.hidden_size, self.inner_size)]
        if self.has_bias:
            shapes += [(width,), (self.hidden_size,)]
        return tuple(PartShape(shape, self.dtype) for shape in shapes)

    def make_view(self, parts: Sequence[Tensor], slot_of_expert: Tensor) -> BankView:
        """See `SlotLayout`."""
        gate_up, down, *biases = parts
        gate_up_bias, down_bias = biases or (None, None)
        return BankView(gate_up, down, slot_of_expert, self.form, gate_up_bias, down_bias)
