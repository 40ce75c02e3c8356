"""Softmax top-k routing and rows sorted by expert, for peers that are an experts' product and no more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutedRows:
    """x_AD (assignments, hidden) sorted by expert; counts_E per expert; which token each row is, and its share."""

    x_AD: Tensor
    counts_E: Tensor
    token_ids: Tensor
    shares_A: Tensor

    def sum_rows(self, y_AD: Tensor, num_tokens: int) -> Tensor:
        """Returns the weighted sum of each token's rows (tokens, hidden)."""
        weighted_AD = y_AD * self.shares_A.to(y_AD.dtype).unsqueeze(1)
        return y_AD.new_zeros(num_tokens, y_AD.shape[1]).index_add_(0, self.token_ids, weighted_AD)


def route_rows(x_TD: Tensor, router_ED: Tensor, top_k: int) -> RoutedRows:
    """Routes in the dtype of x, probabilities in float32."""
    probabilities_TE = torch.nn.functional.linear(x_TD, router_ED).float().softmax(dim=-1)
    shares_TK, experts_TK = probabilities_TE.topk(top_k, dim=-1)
    shares_TK = shares_TK / shares_TK.sum(dim=-1, keepdim=True)
    order = experts_TK.flatten().argsort(stable=True)
    token_ids = order // top_k
    return RoutedRows(
        x_TD[token_ids],
        experts_TK.flatten().bincount(minlength=router_ED.shape[0]),
        token_ids,
        shares_TK.flatten()[order],
    )
