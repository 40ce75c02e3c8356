"""Sums of rows per token. One function for kernels and layer, so that both round in the same places."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels.derivatives import is_transformed
from moesys.kernels.records import TokenSum


def sum_rows(y_AD: Tensor, weights_A: Tensor, token_sum: TokenSum) -> Tensor:
    """Sums weighted rows per result in the order given, without materialising the gathered rows.

    y_AD: (assignments, hidden). weights_A: (assignments,), cast to the dtype of the rows. Returns (results, hidden);
    a result without rows is zero. Differentiable.
    """
    weights = weights_A.to(y_AD.dtype)[token_sum.positions]
    return _sum(y_AD, token_sum, weights)


def add_rows(y_AD: Tensor, token_sum: TokenSum) -> Tensor:
    """Sums rows per result in the order given, each with weight one. Returns (results, hidden)."""
    return _sum(y_AD, token_sum, None)


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
