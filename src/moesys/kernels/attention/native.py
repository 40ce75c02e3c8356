"""Attention over pages on a CPU in C: keys and values are read once, where they lie; a query's bits are its own."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.attention.page_table import PageTable
from moesys.kernels.choice import Obstacle
from moesys.kernels.fork import require_threads
from moesys.kernels.inference_call import is_inference_call
from moesys.kernels.native_calls import find_native_obstacle

ROW_INVARIANT = True
_DTYPES = (torch.float32, torch.bfloat16)


def is_plain_call(
    q_THD: Tensor, keys: Tensor, values: Tensor | None, table: PageTable, sinks_H: Tensor | None
) -> bool:
    """Whether a call is one of decoding that the kernel takes. A no says nothing.

    A short context is attended to in 10 us, which the search for an obstacle would double.
    """
    return (
        q_THD.dtype in _DTYPES
        and keys.dtype in _DTYPES
        and keys.is_contiguous()
        and (values is None or values.is_contiguous())
        and is_inference_call(q_THD, keys, keys if values is None else values, table.page_ids)
        and (sinks_H is None or is_inference_call(sinks_H))
    )


def find_obstacle(
    q_THD: Tensor, keys: Tensor, values: Tensor | None, table: PageTable, sinks_H: Tensor | None
) -> Obstacle | None:
    """Returns why the native kernel cannot take a call, or None."""
    weights = [keys] if values is None else [keys, values]
    return find_native_obstacle(q_THD, weights, [sinks_H, table.page_ids, table.starts_T, table.stops_T])


def attend_pages(
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor | None,
    table: PageTable,
    scale: float,
    value_size: int,
    sliding_window: int | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """See `moesys.kernels.attention.api.attend_pages`."""
    require_threads()
    return native.attend_pages(
        q_THD.contiguous(), keys, values, table.page_ids, table.starts_T, table.stops_T, table.page_tokens,
        scale=scale, value_size=value_size, sliding_window=sliding_window,
        sinks_H=None if sinks_H is None else sinks_H.to(torch.float32).contiguous(),
    )  # fmt: skip
