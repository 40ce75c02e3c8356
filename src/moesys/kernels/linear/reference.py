"""The specification of the dense product: one row at a time, in plain differentiable torch. Works in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels.formats import GROUP_SIZE, Int8Product, Int8Weight, round_to_int8
from moesys.kernels.records import Weight

ROW_INVARIANT = True


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """See `moesys.kernels.linear.api.linear`."""
    x_RK = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Int8Weight):
        x_RK = x_RK.to(torch.promote_types(x.dtype, torch.float32))
    rows = [multiply_vector(weight, x_K) for x_K in x_RK]
    y_RN = torch.stack(rows) if rows else x.new_zeros(0, weight.shape[0])
    y = y_RN.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def multiply_vector(weight_MK: Weight, x_K: Tensor) -> Tensor:
    """Returns (M,) = weight @ x in the dtype of ``x``, for a weight in any format."""
    if not isinstance(weight_MK, Int8Weight):
        return weight_MK.to(x_K.dtype) @ x_K
    y_M = weight_MK.unpack(x_K.dtype) @ x_K
    if weight_MK.product is Int8Product.W8:
        return y_M
    if not x_K.isfinite().all():
        return y_M * torch.nan
    # The value is the rounded product, the gradient is that of the product without rounding.
    return _multiply_rounded(weight_MK, x_K) + (y_M - y_M.detach())


def _multiply_rounded(weight_MK: Int8Weight, x_K: Tensor) -> Tensor:
    values, scales_G = round_to_int8(x_K)
    x_GI = values.long().unflatten(-1, (-1, GROUP_SIZE))
    weight_MGI = weight_MK.values.long().unflatten(-1, (-1, GROUP_SIZE))
    products_MG = (weight_MGI * x_GI).sum(dim=-1)
    return (products_MG * (weight_MK.scales.to(x_K.dtype) * scales_G.to(x_K.dtype))).sum(dim=-1)
