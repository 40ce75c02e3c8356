"""Experts as functions of (rows, hidden): one call per expert that has rows, under plain autograd.

Knows nothing of weights: the functions are the user's own modules, or stand for the experts of a bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.records import ModuleView, Rows

ExpertFunction = Callable[[Tensor], Tensor]


def compute_functions(rows: Rows, functions: Sequence[ExpertFunction | None]) -> Tensor:
    """Returns (assignments, hidden) in the dtype of the rows.

    functions: one per local expert; None for one whose rows are zero.
    Raises `ShapeError` when a function does not return the shape it was given.
    """
    x_AD = rows.x_RD.index_select(0, rows.row_ids)
    pieces = []
    for expert, (function, x_ND) in enumerate(
        zip(functions, x_AD.split(rows.offsets.diff().tolist()), strict=True)
    ):
        if x_ND.shape[0] == 0:
            continue
        y_ND = torch.zeros_like(x_ND) if function is None else function(x_ND)
        if y_ND.shape != x_ND.shape:
            raise ShapeError(
                f"expert {expert} returned {tuple(y_ND.shape)} for rows of {tuple(x_ND.shape)}; "
                "an expert maps (rows, hidden) to (rows, hidden)"
            )
        pieces.append(y_ND.to(x_ND.dtype))
    return torch.cat(pieces) if pieces else x_AD


def find_functions(view: ModuleView) -> list[ExpertFunction | None]:
    """Returns the function of each local expert; None where the view does not hold it."""
    return [None if slot < 0 else view.functions[slot] for slot in view.compute_slots()]
