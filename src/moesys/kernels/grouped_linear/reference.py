"""The specification of the grouped product: one row at a time, in plain differentiable torch. Works in float64."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_INVARIANT = True


def grouped_linear(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    """See `moesys.kernels.grouped_linear.api.grouped_linear`."""
    weight_GNK = weight_GNK.to(x_TGK.dtype)
    rows = [weight_NK @ x_K for x_GK in x_TGK for weight_NK, x_K in zip(weight_GNK, x_GK, strict=True)]
    shape = (*x_TGK.shape[:2], weight_GNK.shape[1])
    return torch.stack(rows).view(shape) if rows else x_TGK.new_zeros(shape)
