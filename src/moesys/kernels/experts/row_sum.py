"""Sums of rows per token. One function for kernels and layer, so that both round in the same places.

In C where no gradient is needed, by the code that sums in the native expert kernel: a lone view and several that are
summed when the last is done give the same bits. Elsewhere by torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.choice import Kernel, Obstacle, choose_kernel
from moesys.kernels.derivatives import is_transformed, is_watched
from moesys.kernels.fork import require_threads
from moesys.kernels.records import TokenSum


def sum_rows(y_AD: Tensor, weights_A: Tensor, token_sum: TokenSum, kernel: Kernel = Kernel.AUTO) -> Tensor:
    """Sums weighted rows per result in the order given, without materialising the gathered rows.

    y_AD: (assignments, hidden). weights_A: (assignments,) float32 or float64. kernel: the one that computed the rows.
    Returns (results, hidden) in the dtype of the rows; a result without rows is zero. Differentiable. Raises
    `KernelError` for a kernel that cannot take the call.
    """

    def find_obstacle() -> Obstacle | None:
        return _find_native_obstacle(y_AD, weights_A, token_sum)

    obstacles = {Kernel.NATIVE: find_obstacle, Kernel.TORCH: _none, Kernel.REFERENCE: _none}
    if choose_kernel("row_sum", kernel, obstacles) is Kernel.NATIVE:
        require_threads()
        return native.sum_rows(y_AD, weights_A, token_sum)
    return sum_rows_in_torch(y_AD, weights_A, token_sum)


def sum_rows_in_torch(y_AD: Tensor, weights_A: Tensor, token_sum: TokenSum) -> Tensor:
    """The same by torch, with weights in the dtype of the rows."""
    weights = weights_A.to(y_AD.dtype)[token_sum.positions]
    return _sum(y_AD, token_sum, weights)


def add_rows(y_AD: Tensor, token_sum: TokenSum) -> Tensor:
    """Sums rows per result in the order given, each with weight one. Returns (results, hidden)."""
    return _sum(y_AD, token_sum, None)


def _find_native_obstacle(y_AD: Tensor, weights_A: Tensor, token_sum: TokenSum) -> Obstacle | None:
    if y_AD.device.type != "cpu" or y_AD.dtype not in (torch.float32, torch.bfloat16):
        return Obstacle(f"it sums float32 or bfloat16 rows on a CPU, these are {y_AD.dtype} on {y_AD.device}")
    for index in (token_sum.positions, token_sum.offsets):
        if index.dtype is not torch.int64 or not index.is_cpu:
            reason = f"it takes int64 positions and offsets on a CPU, got {index.dtype} on {index.device}"
            return Obstacle(reason, "convert them in the dispatcher")
    if is_watched(y_AD) or is_watched(weights_A):
        return Obstacle("it computes no gradients; use it under torch.no_grad()")
    if torch.compiler.is_compiling() or is_transformed(y_AD, weights_A):
        return Obstacle("torch.compile and torch.func see into torch's own operations only")
    reason = native.find_obstacle()
    return None if reason is None else Obstacle(reason)


def _none() -> None:
    """Torch takes every call, for the reference too."""


def _sum(y_AD: Tensor, token_sum: TokenSum, weights: Tensor | None) -> Tensor:
    if token_sum.positions.shape[0] == 0:
        # A sum of no rows is zero and keeps the result in the autograd graph.
        return y_AD.new_zeros(token_sum.num_results, y_AD.shape[1]) + y_AD[:0].sum(dim=0)
    if is_transformed(y_AD, weights):
        return _sum_gathered(y_AD, token_sum, weights)
    return torch.nn.functional.embedding_bag(
        token_sum.positions,
        y_AD,
        token_sum.offsets,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


def _sum_gathered(y_AD: Tensor, token_sum: TokenSum, weights: Tensor | None) -> Tensor:
    """The same sum by operations that torch can differentiate forwards and batch."""
    rows_AD = y_AD[token_sum.positions]
    if weights is not None:
        rows_AD = rows_AD * weights.unsqueeze(1)
    result_ids = torch.arange(token_sum.num_results, device=y_AD.device).repeat_interleave(
        token_sum.offsets.diff()
    )
    return y_AD.new_zeros(token_sum.num_results, y_AD.shape[1]).index_add(0, result_ids, rows_AD)
