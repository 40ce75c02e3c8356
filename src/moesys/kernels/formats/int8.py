"""Weights of one byte: int8 values in groups of 64 columns that share a scale.

A row of K weights is cut into groups of `GROUP_SIZE` columns; weight = value * scale of its group, with values in
[-127, 127] and scale = max |weight| of the group / 127. The largest error of a weight is half its group's scale.
Rows are padded with zeros to whole groups, so that a kernel reads whole vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from moesys.errors import ShapeError

GROUP_SIZE = 64


class Int8Product(StrEnum):
    """How int8 weights are multiplied. Both lose precision in the weights; ``w8a8`` also in the activations."""

    W8 = "w8"
    """Float32 activations times widened weights, float32 sums."""
    W8A8 = "w8a8"
    """Activations rounded to int8 per row and group, integer products per group, float32 sums over groups."""


@dataclass(frozen=True)
class Int8Weight:
    """Matrices of int8 weights.

    values:       (..., rows, groups * 64) int8, zero beyond ``num_columns``.
    scales:       (..., rows, groups) float32.
    num_columns:  columns of the matrix that these stand for.
    product:      how the kernels multiply them.
    """

    values: Tensor
    scales: Tensor
    num_columns: int
    product: Int8Product = Int8Product.W8

    def __post_init__(self) -> None:
        groups = -(-self.num_columns // GROUP_SIZE)
        expected = (*self.values.shape[:-1], groups)
        if self.values.shape[-1] != groups * GROUP_SIZE or tuple(self.scales.shape) != expected:
            raise ShapeError(
                f"int8 weights of {self.num_columns} columns need values (..., {groups * GROUP_SIZE}) and scales "
                f"(..., {groups}) over the same rows, got {tuple(self.values.shape)} and {tuple(self.scales.shape)}"
            )
        if self.values.dtype != torch.int8 or self.scales.dtype != torch.float32:
            raise ShapeError(
                f"int8 weights need int8 values and float32 scales, got {self.values.dtype} and {self.scales.dtype}"
            )

    @property
    def shape(self) -> torch.Size:
        """(..., rows, columns) of the matrices that these stand for."""
        return torch.Size((*self.values.shape[:-1], self.num_columns))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.numel() + 4 * self.scales.numel()

    def __getitem__(self, index: int) -> Int8Weight:
        """Returns the matrices at ``index`` of the first dimension, as views."""
        return Int8Weight(self.values[index], self.scales[index], self.num_columns, self.product)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns (..., rows, columns): the weights that the kernels compute with."""
        grouped = self.values.unflatten(-1, (-1, GROUP_SIZE)).to(torch.float32) * self.scales.unsqueeze(-1)
        return grouped.flatten(-2)[..., : self.num_columns].to(dtype)


def pack_int8(weight: Tensor, product: Int8Product = Int8Product.W8) -> Int8Weight:
    """Rounds (..., rows, columns) weights of any float dtype to int8 groups; ties round to even. A group of zeros
    gets scale 0. Raises `ShapeError` for non-float weights and for NaN or Inf, which no scale can hold."""
    if not weight.is_floating_point() or weight.ndim < 2:
        raise ShapeError(
            f"int8 packing takes (..., rows, columns) floats, got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    values, scales = round_to_int8(weight)
    return Int8Weight(values, scales, weight.shape[-1], product)


def round_to_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (..., groups * 64) int8 and (..., groups) float32 of (..., columns) floats: the rule of the format, for
    weights and for the activations of ``w8a8`` alike. Raises `ShapeError` for NaN or Inf."""
    padding = -matrix.shape[-1] % GROUP_SIZE
    grouped = torch.nn.functional.pad(matrix.detach().float(), (0, padding)).unflatten(-1, (-1, GROUP_SIZE))
    scales = grouped.abs().amax(dim=-1) / 127
    if not bool(scales.isfinite().all()):
        raise ShapeError("int8 rounding needs finite values; this tensor holds NaN or Inf")
    divisors = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    values = (grouped / divisors).round().clamp(-127, 127).to(torch.int8)
    return values.flatten(-2), scales
