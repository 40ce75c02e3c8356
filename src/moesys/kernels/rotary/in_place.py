"""The rotary embedding written straight into its result; the backward pass is the rotation by the negative angle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `moesys.kernels.rotary.api.rotate_pairs`."""
    return _Rotation.apply(x, cos, sin)  # pyrefly: ignore


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, direction=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, direction=-1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotates forwards (1) or backwards (-1)."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    x_first, x_second = x.chunk(2, dim=-1)
    first, second = result.chunk(2, dim=-1)
    torch.mul(x_first, cos, out=first).addcmul_(x_second, sin, value=-direction)
    torch.mul(x_second, cos, out=second).addcmul_(x_first, sin, value=direction)
    return result
