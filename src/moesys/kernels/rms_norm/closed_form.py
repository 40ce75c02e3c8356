"""RMSNorm with its gradients written out: a few passes over memory instead of one autograd node per operation.

With r = 1 / rms and n = x * r, the gradients are dw = sum(g * n) and dx = r * (g * w - n * mean(g * w * n)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `moesys.kernels.rms_norm.api.rms_norm`."""
    return _RMSNorm.apply(x, weight, epsilon)  # pyrefly: ignore


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = _widen(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse_rms = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(epsilon))
        ctx.save_for_backward(x, weight, inverse_rms)
        return (wide * inverse_rms).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        x, weight, inverse_rms = ctx.saved_tensors
        wide_grad, wide_weight = _widen(grad), _widen(weight)
        size = x.shape[-1]
        normed = _widen(x) * inverse_rms
        product = wide_grad * normed
        mean = (product @ wide_weight).div_(size).unsqueeze(-1)
        grad_x = (wide_grad * wide_weight).addcmul_(normed, mean, value=-1).mul_(inverse_rms)
        grad_weight = product.reshape(-1, size).sum(dim=0) if ctx.needs_input_grad[1] else None
        return grad_x.to(x.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
