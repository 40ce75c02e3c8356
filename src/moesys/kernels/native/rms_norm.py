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
    x_RC: Tensor, weights: tuple[Tensor, Tensor], widths: tuple[int, int], epsilon: float
) -> Tensor:
    """Computes both parts of (rows, columns), contiguous in the result. Rows of x may lie apart, as part of wider ones.
    weights: contiguous, in the dtype of x; as many numbers as a group of their part has, of which ``widths`` holds a
    whole number."""
    y_RC = torch.empty(x_RC.shape, dtype=x_RC.dtype, device="cpu")
    first, second = weights
    sizes = (first.shape[0], second.shape[0])
    call = RMSNormCall(
        x_RC.data_ptr(), x_RC.stride(0), first.data_ptr(), sizes[0], widths[0] // sizes[0], second.data_ptr(), sizes[1],
        widths[1] // sizes[1], x_RC.dtype is torch.bfloat16, x_RC.shape[0], epsilon, y_RC.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    load_library().moesys_rms_norm(ctypes.byref(call))
    return y_RC
