"""Sums of rows per token. One function for kernels and layer, so that both round in the same places."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels.experts.records import TokenSum


def sum_rows(y_AD: Tensor, token_sum: TokenSum) -> Tensor:
    """Sums (assignments, hidden) rows per result in the order given, without materialising the gathered rows.

    Returns (results, hidden); a result without rows is zero. Differentiable.
    """
    if token_sum.positions.shape[0] == 0:
        return y_AD.new_zeros(token_sum.num_results, y_AD.shape[1])
    return torch.nn.functional.embedding_bag(
        token_sum.positions, y_AD, token_sum.offsets, mode="sum", include_last_offset=True
    )
