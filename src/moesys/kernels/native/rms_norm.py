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
        x.data_ptr(), weight.data_ptr(), x.dtype is torch.bfloat16, x.numel() // max(1, size), size, epsilon,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    load_library().moesys_rms_norm(ctypes.byref(call))
    return y
