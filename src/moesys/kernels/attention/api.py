"""The entry point of attention over pages: checks the arguments and chooses who computes."""

from __future__ import annotations

from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.attention import native, reference, torch_gather
from moesys.kernels.attention.page_table import PageTable
from moesys.kernels.choice import Kernel, Obstacle, choose_kernel

_IMPLEMENTATIONS = {
    Kernel.NATIVE: native,
    Kernel.TORCH: torch_gather,
    Kernel.REFERENCE: reference,
}


def reads_in_place(
    q_THD: Tensor, keys: Tensor, values: Tensor | None, table: PageTable, sinks_H: Tensor | None
) -> bool:
    """Whether `attend_pages`, left the choice, reads such keys and values where they lie, and does not gather them."""
    return native.is_plain_call(q_THD, keys, values, table, sinks_H)


def attend_pages(
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor | None,
    table: PageTable,
    *,
    scale: float,
    value_size: int | None = None,
    sliding_window: int | None = None,
    sinks_H: Tensor | None = None,
    kernel: Kernel = Kernel.AUTO,
) -> Tensor:
    """Computes softmax(scale * q . keys) values, each query over the tokens that ``table`` gives it.

    q_THD:           (queries, heads, key_size) float. Queries are few per sequence: each reads all its tokens.
    keys:            (rows, kv_heads, key_size) float, the memory of all pages; kv_heads divides heads.
    values:          (rows, kv_heads, value_size), the dtype of ``keys``; None where the first ``value_size`` elements
                     of each key are its value.
    sliding_window:  tokens that a query sees at most, its own included; None for all up to its own.
    sinks_H:         (heads,) float: one more score per head, not scaled, that takes part in the softmax and has no
                     value.

    Sums are float32 (float64 for float64 queries). Returns (queries, heads, value_size) in the dtype of ``q_THD``.
    Raises `ShapeError`, and `KernelError` when the kernel asked for cannot take the call.
    """
    size = _find_value_size(keys, values, value_size)
    _check(q_THD, keys, table, size, sliding_window, sinks_H)

    if kernel is Kernel.AUTO and native.is_plain_call(q_THD, keys, values, table, sinks_H):
        return native.attend_pages(q_THD, keys, values, table, scale, size, sliding_window, sinks_H)

    def find_obstacle() -> Obstacle | None:
        return native.find_obstacle(q_THD, keys, values, table, sinks_H)

    chosen = choose_kernel(
        "attend_pages",
        kernel,
        {Kernel.NATIVE: find_obstacle, Kernel.TORCH: _none, Kernel.REFERENCE: _none},
    )
    return _IMPLEMENTATIONS[chosen].attend_pages(
        q_THD, keys, values, table, scale, size, sliding_window, sinks_H
    )


def _none() -> None:
    """Torch and the reference take every checked call."""


def _find_value_size(keys: Tensor, values: Tensor | None, value_size: int | None) -> int:
    if values is None:
        if value_size is None:
            raise ShapeError("values are neither given nor a part of the keys; pass values, or value_size")
        if not 1 <= value_size <= keys.shape[-1]:
            raise ShapeError(f"value_size ({value_size}) must be 1 to the size of a key ({keys.shape[-1]})")
        return value_size
    if values.ndim != 3 or values.shape[:2] != keys.shape[:2] or values.dtype is not keys.dtype:
        raise ShapeError(
            f"values must have the rows, heads and dtype of keys {tuple(keys.shape)} {keys.dtype}, got "
            f"{tuple(values.shape)} {values.dtype}"
        )
    if value_size not in (None, values.shape[2]):
        raise ShapeError(
            f"value_size ({value_size}) must be that of values ({values.shape[2]}); leave it out"
        )
    return values.shape[2]


def _check(
    q_THD: Tensor,
    keys: Tensor,
    table: PageTable,
    value_size: int,
    sliding_window: int | None,
    sinks_H: Tensor | None,
) -> None:
    if q_THD.ndim != 3 or keys.ndim != 3 or q_THD.shape[2] != keys.shape[2]:
        raise ShapeError(
            "queries and keys must be (queries, heads, size) and (rows, kv_heads, size) of one size, got "
            f"{tuple(q_THD.shape)} and {tuple(keys.shape)}"
        )
    num_queries, num_heads, _ = q_THD.shape
    if not keys.shape[1] or num_heads % keys.shape[1]:
        raise ShapeError(f"kv_heads ({keys.shape[1]}) must divide heads ({num_heads})")
    if table.num_queries != num_queries:
        raise ShapeError(
            f"the table has {table.num_queries} queries, q has {num_queries}; give each its tokens"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ShapeError(f"sliding_window ({sliding_window}) must be 1 or more: a token sees itself")
    if sinks_H is not None and sinks_H.shape != (num_heads,):
        raise ShapeError(f"sinks must be ({num_heads},), one per head, got {tuple(sinks_H.shape)}")
