"""One product of activations with a frozen or trained matrix, in any weight format. Differentiable.

Knows nothing of experts. Int8 weights are unpacked for the call and again for its backward pass, so that autograd
never keeps a widened bank; they get no gradient, their activations do. Rounding activations (``w8a8``) counts as
the identity in the backward pass, as in any straight-through estimate (arXiv 1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from moesys.kernels.formats import GROUP_SIZE, Int8Product, Int8Weight, round_to_int8
from moesys.kernels.records import Weight


def multiply_weight(x_NK: Tensor, weight_MK: Weight) -> Tensor:
    """Returns (rows, M) = x @ weight^T in the dtype of ``x``; float weights are widened to it."""
    if isinstance(weight_MK, Int8Weight):
        return _Int8Product.apply(x_NK, weight_MK)  # pyrefly: ignore
    return linear(x_NK, weight_MK.to(x_NK.dtype))


class _Int8Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_NK: Tensor, weight_MK: Int8Weight) -> Tensor:  # pyrefly: ignore
        if weight_MK.product is Int8Product.W8A8:
            return _multiply_rounded(x_NK, weight_MK)
        return x_NK @ weight_MK.unpack(x_NK.dtype).t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Int8Weight], output: Tensor) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def jvp(ctx: Any, tangent_NK: Tensor, _: None) -> Tensor:  # pyrefly: ignore
        return tangent_NK @ ctx.weight.unpack(tangent_NK.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore
        return grad_NM @ ctx.weight.unpack(grad_NM.dtype), None


def _multiply_rounded(x_NK: Tensor, weight_MK: Int8Weight) -> Tensor:
    """Sums exact integer products, group by group: 64 * 127 * 127 is less than 2^24, so float32 holds them.

    A row with NaN or Inf has no scale; its result is NaN and its neighbours' is not touched.
    """
    is_finite_N1 = x_NK.isfinite().all(dim=1, keepdim=True)
    values_NK, scales_NG = round_to_int8(torch.where(is_finite_N1, x_NK, 0))
    scales_NG, weight_scales_MG = scales_NG.to(x_NK.dtype), weight_MK.scales.to(x_NK.dtype)
    y_NM = x_NK.new_zeros(x_NK.shape[0], weight_MK.shape[0])
    with torch.autocast(x_NK.device.type, enabled=False):
        for group in range(scales_NG.shape[1]):
            columns = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
            product_NM = (
                values_NK[:, columns].to(x_NK.dtype) @ weight_MK.values[:, columns].to(x_NK.dtype).t()
            )
            y_NM += product_NM.mul_(scales_NG[:, group, None]).mul_(weight_scales_MG[:, group])
    return y_NM.masked_fill_(~is_finite_N1, torch.nan)
