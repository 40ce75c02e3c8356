"""The specification of the fused output head and loss, in plain differentiable torch. Holds all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels.cross_entropy.target import IGNORED_TARGET


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor) -> Tensor:
    """See `moesys.kernels.cross_entropy.api.linear_cross_entropy`."""
    logits_TV = hidden_TD @ weight_VD.t()
    if logits_TV.dtype != torch.float64:
        logits_TV = logits_TV.float()
    return torch.nn.functional.cross_entropy(
        logits_TV, target_ids_T, ignore_index=IGNORED_TARGET, reduction="sum"
    )
