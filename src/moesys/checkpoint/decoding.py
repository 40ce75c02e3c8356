"""Numbers of quantised checkpoints as floats: FP8 with factors per block, and MXFP4.

Pure functions from tensors to tensors; knows nothing of files or models. No kernel takes these formats, so they are
decoded once, when a model is loaded, in sections of a few rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MXFP4_GROUP = 32
"""Elements of MXFP4 that share an exponent."""

_E8M0_BIAS = 127
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_fp8(values: Tensor, factors: Tensor, block: tuple[int, int], first_row: int = 0) -> Tensor:
    """Returns (rows, columns) float32: each value times the factor of its block.

    values:     (rows, columns) in float8; the first of them is row ``first_row`` of its block.
    factors:    (block rows, block columns): float32, bfloat16, or exponents as `decode_exponents` takes them.
    block:      rows and columns of a block; the blocks at the ends may be partial.
    """
    rows, columns = values.shape
    factors = decode_exponents(factors) if factors.dtype in _EXPONENT_DTYPES else factors.float()
    spread = factors.index_select(1, torch.arange(columns) // block[1])
    decoded = torch.take(_E4M3_VALUES, values.view(torch.uint8).long())
    end = block[0] - first_row
    for start, factors_of_row in zip((0, *range(end, rows, block[0])), spread, strict=True):
        decoded[start:end].mul_(factors_of_row)
        end += block[0]
    return decoded


def decode_exponents(exponents: Tensor) -> Tensor:
    """Returns 2^(byte - 127) as float32 of E8M0 exponents, in uint8 or float8_e8m0fnu; 255 is NaN."""
    ids = exponents.contiguous().view(torch.uint8).long()
    return torch.take(_E8M0_VALUES, ids)


def decode_mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """Returns (groups * 32,) bfloat16, which holds them exactly, of (groups, 16) bytes and (groups,) E8M0 exponents.

    A byte holds two 4-bit floats (OCP Microscaling Formats 1.0, E2M1), the earlier element in the low half.
    """
    pairs = torch.take(_MXFP4_PAIRS, blocks.flatten().long()).view(torch.bfloat16)
    factors = decode_exponents(exponents).to(torch.bfloat16)
    return pairs.view(-1, MXFP4_GROUP).mul_(factors.view(-1, 1)).flatten()


def _make_mxfp4_pairs() -> Tensor:
    """Returns (256,) int32: the two values of every byte, in bfloat16, as one word."""
    signed = torch.tensor([*_E2M1_VALUES, *(-value for value in _E2M1_VALUES)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([signed[byte & 15], signed[byte >> 4]], dim=1).view(torch.int32).flatten()


_E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_E8M0_VALUES = torch.tensor([2.0 ** (byte - _E8M0_BIAS) for byte in range(255)] + [math.nan])
_EXPONENT_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
_MXFP4_PAIRS = _make_mxfp4_pairs()
