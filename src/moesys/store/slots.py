"""Fixed memory for sections: a number of slots, allocated once, each made of the same parts.

A part of all slots is one tensor, so that a kernel reads it as a bank whose experts lie in slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.store.memory import allocate_weight


@dataclass(frozen=True)
class PartShape:
    """The tensor that one part of a slot holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SlotPool:
    """``num_slots`` slots in the memory of this machine.

    parts:  one tensor per part, (slots, *shape of the part), contiguous.
    """

    def __init__(self, num_slots: int, shapes: Sequence[PartShape]) -> None:
        """Allocates the memory. Raises `ShapeError` for no slots."""
        if num_slots < 1:
            raise ShapeError(f"a pool needs at least 1 slot, got {num_slots}; raise the budget")
        self.num_slots = num_slots
        self.parts: tuple[Tensor, ...] = tuple(
            allocate_weight((num_slots, *shape.shape), shape.dtype) for shape in shapes
        )
        self._bytes = [part.view(num_slots, -1).view(torch.uint8).numpy() for part in self.parts]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return sum(part[0].numel() * part.element_size() for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.slot_bytes

    def open_part(self, slot: int, part: int, offset: int, num_bytes: int) -> memoryview:
        """Returns the writable bytes of one place in a slot. Raises `ShapeError` when it does not lie inside."""
        row = self._bytes[part][slot]
        if not 0 <= offset <= offset + num_bytes <= row.shape[0]:
            raise ShapeError(
                f"bytes {offset} to {offset + num_bytes} do not lie in part {part} of a slot ({row.shape[0]} bytes)"
            )
        return memoryview(row[offset : offset + num_bytes])
