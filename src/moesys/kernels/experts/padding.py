"""Groups of rows stretched to a few recurring sizes, for libraries that compile a product per shape.

oneDNN, which multiplies bfloat16 on CPUs, generates code for each new shape (0.4 ms, more than the product of 256
rows takes) and keeps the last 1024. The number of an expert's rows changes at every step, so almost every product
would be new. The rows added here have weight zero: they change no result and no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesys.kernels.records import Rows, TokenSum

_FREE_ROWS = 16
"""Groups of up to so many rows keep their size: they are few shapes, and padding would multiply their cost."""
_MULTIPLE = 32
"""Larger groups are stretched to a multiple of this."""


@dataclass(frozen=True)
class PaddedGroups:
    """Rows with stretched groups, and where each assignment went.

    places: (assignments,) int64: the place of each assignment in the new order.
    """

    rows: Rows
    places: Tensor

    def pad_weights(self, weights_A: Tensor) -> Tensor:
        """Returns the weights in the new order, zero for added rows; differentiable."""
        return weights_A.new_zeros(self.rows.num_assignments).index_copy(0, self.places, weights_A)

    def move_positions(self, token_sum: TokenSum) -> TokenSum:
        """Returns the same sums over the new order."""
        return replace(token_sum, positions=self.places[token_sum.positions])


def pad_groups(rows: Rows) -> PaddedGroups:
    """Stretches the groups; added rows read a row of their own group."""
    counts = rows.offsets.diff()
    padded = torch.where(counts <= _FREE_ROWS, counts, (counts + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE)
    offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    shift = torch.repeat_interleave(
        offsets[:-1] - rows.offsets[:-1], counts, output_size=rows.num_assignments
    )
    places = torch.arange(rows.num_assignments, device=counts.device) + shift
    num_places = int(offsets[-1])
    if num_places == rows.num_assignments:
        return PaddedGroups(rows, places)
    # An added row repeats one of its own group's: a NaN in another group's row must not reach this one's gradients.
    firsts = rows.row_ids[rows.offsets[:-1].clamp(max=rows.num_assignments - 1)]
    row_ids = torch.repeat_interleave(firsts, padded, output_size=num_places).index_copy(
        0, places, rows.row_ids
    )
    return PaddedGroups(Rows(rows.x_RD, row_ids, offsets), places)
