"""The dense product by torch: every device, differentiable; bits depend on the number of rows.

Chosen by ``auto`` in training, its products are those of `moesys.kernels.products`; asked for by name, torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moesys.kernels.derivatives import is_transformed
from moesys.kernels.formats import Int8Weight
from moesys.kernels.products import multiply, prefers_native
from moesys.kernels.records import Weight
from moesys.kernels.weight_product import multiply_weight

ROW_INVARIANT = False


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """See `moesys.kernels.linear.api.linear`. int8 weights are widened for the call."""
    if isinstance(weight, Int8Weight):
        x_RK = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        y = multiply_weight(x_RK, weight).to(x.dtype).view(*x.shape[:-1], weight.shape[0])
        return y if bias is None else y + bias
    if weight.dtype is torch.bfloat16 and x.dtype is torch.float32:
        weight = weight.float()
    is_plain = torch.is_autocast_enabled(x.device.type) or not prefers_native(x)
    if is_plain or is_transformed(x, weight, bias):
        return functional.linear(x, weight, bias)
    x_RK = x.reshape(-1, x.shape[-1])
    y = _Linear.apply(x_RK, weight).view(*x.shape[:-1], weight.shape[0])  # pyrefly: ignore
    return y if bias is None else y + bias


class _Linear(torch.autograd.Function):
    """x @ weight^T by `multiply`, which autograd cannot see into."""

    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_RK, weight_NK)
        return multiply(x_RK, weight_NK.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        x_RK, weight_NK = ctx.saved_tensors
        grad_RN = grad_RN.contiguous()
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            multiply(grad_RN, weight_NK) if needs_x else None,
            multiply(grad_RN.t(), x_RK) if needs_weight else None,
        )
