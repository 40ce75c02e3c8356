"""RMSNorm in C: rows of float32 or bfloat16, one call, a row's bits its own."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moesys.kernels.native.library import load_library
from moesys.kernels.native.structures import RMSNormCall


def compute_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Computes (..., size) like ``x``. x, weight: contiguous, both float32 or both bfloat16, on a CPU."""
    y = torch.empty_like(x)
    size = weight.shape[0]
    call = RMSNormCall(
        x.data_ptr(), size, weight.data_ptr(), size, 1, None, 0, 0, x.dtype is torch.bfloat16,
        x.numel() // max(1, size), epsilon, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    load_library().moesys_rms_norm(ctypes.byref(call))
    return y


def compute_rms_norm_pair(
    x: Tensor, weights: tuple[Tensor, Tensor], widths: tuple[int, int], epsilon: float
) -> Tensor:
    """Computes both parts of (..., columns), contiguous in the result.

    x: contiguous, or (..., rows, columns) with dimensions of size 1 before, whose rows may lie apart as part of wider
    ones. weights: contiguous, in the dtype of x; as many numbers as a group of their part has, of which ``widths``
    holds a whole number.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    first, second = weights
    columns, first_size, second_size = x.shape[-1], first.shape[0], second.shape[0]
    row_stride = columns if x.is_contiguous() else x.stride(-2)
    call = RMSNormCall(
        x.data_ptr(), row_stride, first.data_ptr(), first_size, widths[0] // first_size, second.data_ptr(), second_size,
        widths[1] // second_size, x.dtype is torch.bfloat16, x.numel() // max(1, columns), epsilon, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    load_library().moesys_rms_norm(ctypes.byref(call))
    return y
