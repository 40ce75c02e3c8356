"""Where a tensor of a checkpoint lies in our parameters: the one record that reading and writing share.

Checkpoints split, stack, transpose and interleave what our parameters hold in one piece. All of that is a question of
strides: for every tensor of a checkpoint there is a view of one of our parameters whose elements come in the same
order. Reading copies into the views, writing copies out of them. Knows nothing of files or families.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from moesys.errors import ModelFormatError


class Encoding(StrEnum):
    """How a checkpoint stores the numbers of one tensor."""

    PLAIN = "plain"
    """One floating-point tensor; in float8 with ``NAME_scale_inv`` beside it, one factor per block."""
    MXFP4 = "mxfp4"
    """``NAME_blocks`` with two 4-bit floats per byte and ``NAME_scales`` with one exponent per 32 of them."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint and the memory of ours that it is.

    name:      in the checkpoint.
    shape:     in the checkpoint, decoded.
    view:      of a parameter or buffer, its elements in the order of the checkpoint's; its dimensions may be finer
               than ``shape``, as strides need it.
    encoding:  how the checkpoint stores it.
    dtype:     as which it is written whatever the model is written as; None for the model's.
    """

    name: str
    shape: tuple[int, ...]
    view: Tensor
    encoding: Encoding = Encoding.PLAIN
    dtype: torch.dtype | None = None

    def under(self, prefix: str) -> StoredTensor:
        """Returns the same with ``prefix.`` before its name."""
        return replace(self, name=f"{prefix}.{self.name}")

    def take(self, index: int) -> StoredTensor:
        """Returns the part at ``index`` of the first dimension, where the view has the same one."""
        return replace(self, shape=self.shape[1:], view=self.view[index])

    def place(self, memory: Tensor, start: int = 0) -> StoredTensor:
        """Returns the same tensor in other memory, which holds the elements of our parameter from ``start`` on."""
        view = self.view
        return replace(
            self, view=memory.as_strided(view.shape, view.stride(), int(view.storage_offset()) - start)
        )

    def fill(self, values: Tensor) -> None:
        """Copies decoded values into our memory, casting them. Raises `ModelFormatError` for another shape."""
        if tuple(values.shape) != self.shape:
            raise ModelFormatError(
                f"{self.name} has shape {tuple(values.shape)}, config.json asks for {self.shape}"
            )
        self.view.copy_(values.reshape(self.view.shape))

    def collect(self) -> Tensor:
        """Returns our values in ``shape``; copies where strides need it."""
        return self.view.detach().reshape(self.shape)
