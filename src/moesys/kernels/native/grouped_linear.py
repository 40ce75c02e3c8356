"""Products of a matrix per group in C: one call for all groups, weights read where they lie."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moesys.kernels.native.library import load_library
from moesys.kernels.native.structures import GroupedLinearCall


def compute_grouped_linear(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    """Computes `moesys.kernels.grouped_linear.api.grouped_linear` on a CPU, with float32 sums.

    x_TGK: float32 or bfloat16, its last dimension contiguous. weight_GNK: the same or bfloat16, with
    `fits_grouped_linear`.
    """
    num_tokens, num_groups, columns = x_TGK.shape
    num_outputs = weight_GNK.shape[1]
    y_TGN = x_TGK.new_empty(num_tokens, num_groups, num_outputs)
    call = GroupedLinearCall(
        x_TGK.data_ptr(), x_TGK.stride(0), x_TGK.stride(1), x_TGK.dtype is torch.bfloat16,
        num_tokens, num_groups, columns,
        weight_GNK.data_ptr(), weight_GNK.dtype is torch.bfloat16, _has_rows(weight_GNK),
        weight_GNK.stride(0), weight_GNK.stride(2), num_outputs,
        y_TGN.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if load_library().moesys_grouped_linear(ctypes.byref(call)):
        raise MemoryError("the native grouped product found no memory for widened rows")
    return y_TGN


def fits_grouped_linear(weight_GNK: Tensor) -> bool:
    """Whether the rows of each matrix lie contiguous one behind the other, or its columns are contiguous."""
    return _has_rows(weight_GNK) or weight_GNK.stride(1) == 1


def _has_rows(weight_GNK: Tensor) -> bool:
    return weight_GNK.stride(2) == 1 and weight_GNK.stride(1) == weight_GNK.shape[2]
