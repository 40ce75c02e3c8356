"""Attention over pages in C: one call for the new tokens of all sequences, keys and values read where they lie."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.native.library import load_library
from moesys.kernels.native.operands import point
from moesys.kernels.native.structures import AttentionCall

_NO_WINDOW = 2**62


def attend_pages(
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor | None,
    page_ids: Tensor,
    starts_T: Tensor,
    stops_T: Tensor,
    page_tokens: int,
    *,
    scale: float,
    value_size: int,
    sliding_window: int | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Computes `moesys.kernels.attention.api.attend_pages` from contiguous tensors on a CPU: float32 or bfloat16
    queries, keys and values of either dtype, int64 indices as in a `PageTable`, float32 sinks.

    Raises `ShapeError` for pages or stops out of range.
    """
    num_queries, num_heads, key_size = q_THD.shape
    rows, num_kv_heads, _ = keys.shape
    y_THD = q_THD.new_empty(num_queries, num_heads, value_size)
    start = keys.data_ptr()
    call = AttentionCall(
        q_THD.data_ptr(), q_THD.dtype is torch.bfloat16,
        start, start if values is None else values.data_ptr(), keys.dtype is torch.bfloat16,
        rows, num_heads, num_kv_heads, key_size, value_size, key_size if values is None else value_size,
        page_ids.data_ptr(), starts_T.data_ptr(), stops_T.data_ptr(), page_ids.shape[0], num_queries, page_tokens,
        _NO_WINDOW if sliding_window is None else sliding_window, point(sinks_H), scale, y_THD.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    status = load_library().moesys_attend_pages(ctypes.byref(call))
    if status == 1:
        raise MemoryError("the native attention found no memory for its scores")
    if status == 2:
        raise ShapeError(
            f"every query needs 1 or more tokens, on pages of {page_tokens} below row {rows}; got stops "
            f"{stops_T.tolist()}, starts {starts_T.tolist()} and page ids {page_ids.tolist()}"
        )
    return y_THD
