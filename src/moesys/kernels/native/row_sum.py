"""Weighted sums of rows in C: float32 weights and sums, rows and results float32 or bfloat16."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.native.library import load_library
from moesys.kernels.native.operands import require_readable
from moesys.kernels.native.structures import RowSumCall, RowSums
from moesys.kernels.records import TokenSum


class SumBuffers:
    """The sums of one call as the record of row_sum.h, their results and the memory behind the pointers."""

    def __init__(self, weights_A: Tensor, token_sum: TokenSum, columns: int, dtype: torch.dtype) -> None:
        """``dtype`` is that of the results; rows are rounded to it before they are weighted. Raises `ShapeError` for
        indices that are not int64 on a CPU, and for weights elsewhere."""
        require_readable(torch.int64, token_sum.positions, token_sum.offsets)
        self.results_RD = torch.empty(token_sum.num_results, columns, dtype=dtype, device="cpu")
        self._weights_A = weights_A.float().contiguous()
        require_readable(torch.float32, self._weights_A)
        self._positions = token_sum.positions.contiguous()
        self._offsets = token_sum.offsets.contiguous()
        self.record = RowSums(
            weights=self._weights_A.data_ptr(),
            positions=self._positions.data_ptr(),
            offsets=self._offsets.data_ptr(),
            num_results=token_sum.num_results,
            num_positions=self._positions.shape[0],
            is_bf16=dtype is torch.bfloat16,
            results=self.results_RD.data_ptr(),
        )


def sum_rows(y_AD: Tensor, weights_A: Tensor, token_sum: TokenSum) -> Tensor:
    """Sums weighted rows per result in the order given. Returns (results, columns) in the dtype of ``y_AD``. Raises
    `ShapeError` for an index out of range."""
    num_rows, columns = y_AD.shape
    if weights_A.shape != (num_rows,) or token_sum.offsets.shape[0] == 0:
        raise ShapeError(
            f"there must be one weight per row ({num_rows}) and offsets that begin with 0, got shape "
            f"{tuple(weights_A.shape)} and {token_sum.offsets.shape[0]} offsets"
        )
    if y_AD.dtype is not torch.bfloat16:
        require_readable(torch.float32, y_AD)
    sums = SumBuffers(weights_A, token_sum, columns, y_AD.dtype)
    y_AD = y_AD.contiguous()
    call = RowSumCall(
        sums=sums.record,
        rows=y_AD.data_ptr(),
        are_bf16=y_AD.dtype is torch.bfloat16,
        num_rows=num_rows,
        columns=columns,
        threads=torch.get_num_threads(),
    )
    if load_library().moesys_sum_rows(ctypes.byref(call)):
        raise ShapeError(
            f"positions of a sum must be in 0..{num_rows - 1}, and its offsets must rise from 0 to the number of "
            f"positions ({token_sum.positions.shape[0]}); one of them does not"
        )
    return sums.results_RD
