"""What int8 activations stand for."""

from __future__ import annotations

from torch import Tensor

from moesys.kernels.formats import GROUP_SIZE, round_to_int8


def round_activations(x: Tensor) -> Tensor:
    """Returns what ``w8a8`` computes with instead of (..., columns) ``x``: int8 values times their group's scale."""
    values, scales = round_to_int8(x)
    grouped = values.unflatten(-1, (-1, GROUP_SIZE)).to(x.dtype) * scales.unsqueeze(-1).to(x.dtype)
    return grouped.flatten(-2)[..., : x.shape[-1]]
