"""Matrices rounded to int8, a few rows at a time, and how far off the rounded weights are.

Knows tensors; knows nothing of files or models. Rows are rounded one like the other, so that cutting changes no bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.kernels import Int8Weight, pack_int8
from moesys.kernels.formats import GROUP_SIZE

_ROUNDED_ELEMENTS = 2**20
"""Weights rounded at a time: what rounding needs besides is some 20 times as many bytes."""


@dataclass(frozen=True)
class RoundingError:
    """How far rounded weights are from what they were, as shares of the weights' root mean square.

    largest, mean: of the absolute differences.
    """

    largest: float
    mean: float


class ErrorMeter:
    """Sums up the errors of matrices that are rounded one after the other."""

    def __init__(self) -> None:
        self._num_weights = 0
        self._largest = self._sum = self._sum_of_squares = 0.0

    def add(self, weight: Tensor, rounded: Int8Weight) -> None:
        """Takes (..., rows, columns) weights of any float dtype and what they were rounded to."""
        exact = weight.float()
        errors = (rounded.unpack() - exact).abs_()
        self._num_weights += weight.numel()
        self._largest = max(self._largest, errors.max().item()) if errors.numel() else self._largest
        self._sum += errors.sum(dtype=torch.float64).item()
        self._sum_of_squares += exact.square_().sum(dtype=torch.float64).item()

    def measure(self) -> RoundingError | None:
        """Returns the errors so far; None where nothing was rounded. Weights that are all zero have none."""
        if not self._num_weights:
            return None
        scale = math.sqrt(self._sum_of_squares / self._num_weights) or 1.0
        return RoundingError(self._largest / scale, self._sum / self._num_weights / scale)


def round_matrix(weight: Tensor, meter: ErrorMeter) -> Int8Weight:
    """Returns what `pack_int8` makes of a (rows, columns) matrix, in little more memory. Raises `ShapeError` for NaN or
    Inf."""
    rows, columns = weight.shape
    groups = -(-columns // GROUP_SIZE)
    values = torch.empty(rows, groups * GROUP_SIZE, dtype=torch.int8)
    scales = torch.empty(rows, groups)
    step = max(1, _ROUNDED_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        part = weight[start : start + step]
        rounded = pack_int8(part)
        meter.add(part, rounded)
        values[start : start + step] = rounded.values
        scales[start : start + step] = rounded.scales
    return Int8Weight(values, scales, columns)
