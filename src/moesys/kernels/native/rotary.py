"""The rotary embedding in C: heads of float32 or bfloat16 where they lie, queries and keys in one call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moesys.kernels.native.library import load_library
from moesys.kernels.native.structures import RotaryCall


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns (batch, sequence, heads, size) by (batch, sequence, 1, size / 2) angles and returns it contiguous.

    x: float32 or bfloat16 on a CPU; elements of a head contiguous, tokens equally far apart. cos, sin: contiguous
    float32.
    """
    batch, sequence, heads, size = x.shape
    _, token_stride, head_stride, _ = x.stride()
    y = x.new_empty(x.shape)
    call = RotaryCall(
        x.data_ptr(), token_stride, head_stride, cos.data_ptr(), sin.data_ptr(), x.dtype is torch.bfloat16,
        batch * sequence, heads, size // 2, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    load_library().moesys_rotate(ctypes.byref(call))
    return y
