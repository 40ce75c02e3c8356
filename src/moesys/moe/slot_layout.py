"""How the parts of a slot make up the weights of an expert: the shapes of the parts, and the view that kernels read.

Knows formats of weights; knows nothing of files, caches or layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesys.kernels import BankView, ExpertForm, Int8Product, Int8Weight
from moesys.kernels.formats import GROUP_SIZE
from moesys.store import PartShape


class SlotLayout(Protocol):
    """What one slot holds. Layers whose layouts are equal can share slots."""

    @property
    def part_shapes(self) -> tuple[PartShape, ...]:
        """Of one expert, in the order of the slot's parts."""
        ...

    def make_view(self, parts: Sequence[Tensor], slot_of_expert: Tensor | None) -> BankView:
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
    form: ExpertForm = ExpertForm()  # noqa: RUF009 - frozen
    has_bias: bool = False

    @property
    def part_shapes(self) -> tuple[PartShape, ...]:
        """See `SlotLayout`."""
        width = self.form.num_halves * self.inner_size
        shapes = [(width, self.hidden_size), (self.hidden_size, self.inner_size)]
        if self.has_bias:
            shapes += [(width,), (self.hidden_size,)]
        return tuple(PartShape(shape, self.dtype) for shape in shapes)

    def make_view(self, parts: Sequence[Tensor], slot_of_expert: Tensor | None) -> BankView:
        """See `SlotLayout`."""
        gate_up, down, *biases = parts
        gate_up_bias, down_bias = biases or (None, None)
        return BankView(gate_up, down, slot_of_expert, self.form, gate_up_bias, down_bias)


@dataclass(frozen=True)
class Int8Layout:
    """Matrices in int8 groups: values and scales of gate_up, then of down, then both biases in float32 where there are
    any, as the activations of int8 experts are.

    inner_size: of the expert's hidden layer. product: how the kernels multiply; the bytes are the same for both.
    """

    hidden_size: int
    inner_size: int
    form: ExpertForm = ExpertForm()  # noqa: RUF009 - frozen
    has_bias: bool = False
    product: Int8Product = Int8Product.W8

    @property
    def part_shapes(self) -> tuple[PartShape, ...]:
        """See `SlotLayout`."""
        width = self.form.num_halves * self.inner_size
        matrices = _outline_matrix(width, self.hidden_size) + _outline_matrix(
            self.hidden_size, self.inner_size
        )
        biases = [PartShape((size,), torch.float32) for size in (width, self.hidden_size) if self.has_bias]
        return (*matrices, *biases)

    def make_view(self, parts: Sequence[Tensor], slot_of_expert: Tensor | None) -> BankView:
        """See `SlotLayout`."""
        gate_up_values, gate_up_scales, down_values, down_scales, *biases = parts
        gate_up_bias, down_bias = biases or (None, None)
        return BankView(
            Int8Weight(gate_up_values, gate_up_scales, self.hidden_size, self.product),
            Int8Weight(down_values, down_scales, self.inner_size, self.product),
            slot_of_expert,
            self.form,
            gate_up_bias,
            down_bias,
        )


def _outline_matrix(rows: int, columns: int) -> tuple[PartShape, PartShape]:
    groups = -(-columns // GROUP_SIZE)
    return PartShape((rows, groups * GROUP_SIZE), torch.int8), PartShape((rows, groups), torch.float32)
