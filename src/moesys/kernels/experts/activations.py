"""What an expert does between its two products, and the derivative of it in closed form.

Knows nothing of weights or groups of rows. The idea of the two halves: forward, `activate` keeps nothing; backward,
`linearize` starts again from the first product, computes what value and derivative share once, and gives both.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from moesys.kernels.records import Activation, ExpertForm


def activate(hidden_NH: Tensor, form: ExpertForm) -> Tensor:
    """Returns (rows, inner) of (rows, halves * inner), in the same dtype; differentiable by autograd too."""
    match form.activation:
        case Activation.SWIGLU:
            gate_NF, up_NF = hidden_NH.chunk(2, dim=1)
            return silu(gate_NF).mul_(up_NF)
        case Activation.CLAMPED_SWIGLU:
            gate_NF, up_NF = _clamp_halves(hidden_NH, form)
            return gate_NF * torch.sigmoid(form.alpha * gate_NF) * (up_NF + 1)
        case Activation.GELU:
            return gelu(hidden_NH)
        case Activation.RELU:
            return torch.relu(hidden_NH)


class Linearized(Protocol):
    """An activation at one point."""

    def compute_inner(self) -> Tensor:
        """Returns (rows, inner): the value."""
        ...

    def compute_hidden_gradient(self, grad_inner_NF: Tensor) -> Tensor:
        """Returns (rows, halves * inner): the gradient before the activation. May write over its argument."""
        ...


def linearize(hidden_NH: Tensor, form: ExpertForm) -> Linearized:
    """Returns value and derivative of the activation at ``hidden_NH``, which is kept and not changed."""
    match form.activation:
        case Activation.SWIGLU:
            return _SwiGLU(hidden_NH)
        case Activation.CLAMPED_SWIGLU:
            return _ClampedSwiGLU(hidden_NH, form)
        case Activation.GELU:
            return _GELU(hidden_NH)
        case Activation.RELU:
            return _ReLU(hidden_NH)


class _SwiGLU:
    def __init__(self, hidden_NH: Tensor) -> None:
        self._hidden_NH = hidden_NH
        self._gate_NF, self._up_NF = hidden_NH.chunk(2, dim=1)
        self._silu_NF = silu(self._gate_NF)

    def compute_inner(self) -> Tensor:
        return self._silu_NF * self._up_NF

    def compute_hidden_gradient(self, grad_inner_NF: Tensor) -> Tensor:
        grad_NH = torch.empty_like(self._hidden_NH)
        grad_gate_NF, grad_up_NF = grad_NH.chunk(2, dim=1)
        torch.mul(grad_inner_NF, self._silu_NF, out=grad_up_NF)
        torch.ops.aten.silu_backward.grad_input(
            grad_inner_NF.mul_(self._up_NF), self._gate_NF, grad_input=grad_gate_NF
        )
        return grad_NH


class _ClampedSwiGLU:
    """With s = sigmoid(alpha * gate) the slope of gate * s is s * (1 + alpha * gate * (1 - s)).
    Where a half is clamped its gradient is zero; on the limit it passes, as in torch."""

    def __init__(self, hidden_NH: Tensor, form: ExpertForm) -> None:
        self._hidden_NH, self._form = hidden_NH, form
        self._gate_NF, up_NF = _clamp_halves(hidden_NH, form)
        self._up_plus_one_NF = up_NF + 1
        self._sigmoid_NF = torch.sigmoid(form.alpha * self._gate_NF)

    def compute_inner(self) -> Tensor:
        return self._gate_NF * self._sigmoid_NF * self._up_plus_one_NF

    def compute_hidden_gradient(self, grad_inner_NF: Tensor) -> Tensor:
        raw_gate_NF, raw_up_NF = self._hidden_NH.chunk(2, dim=1)
        slope_NF = self._sigmoid_NF * (1 + self._form.alpha * self._gate_NF * (1 - self._sigmoid_NF))
        grad_gate_NF = grad_inner_NF * self._up_plus_one_NF * slope_NF
        grad_up_NF = grad_inner_NF * self._gate_NF * self._sigmoid_NF
        grad_gate_NF.masked_fill_(raw_gate_NF > self._form.limit, 0)
        grad_up_NF.masked_fill_(raw_up_NF.abs() > self._form.limit, 0)
        return torch.cat([grad_gate_NF, grad_up_NF], dim=1)


class _GELU:
    def __init__(self, hidden_NH: Tensor) -> None:
        self._hidden_NH = hidden_NH

    def compute_inner(self) -> Tensor:
        return gelu(self._hidden_NH)

    def compute_hidden_gradient(self, grad_inner_NF: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad_inner_NF, self._hidden_NH)


class _ReLU:
    def __init__(self, hidden_NH: Tensor) -> None:
        self._hidden_NH = hidden_NH

    def compute_inner(self) -> Tensor:
        return torch.relu(self._hidden_NH)

    def compute_hidden_gradient(self, grad_inner_NF: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(grad_inner_NF, self._hidden_NH, 0)


def _clamp_halves(hidden_NH: Tensor, form: ExpertForm) -> tuple[Tensor, Tensor]:
    gate_NF, up_NF = hidden_NH.chunk(2, dim=1)
    return gate_NF.clamp(max=form.limit), up_NF.clamp(-form.limit, form.limit)
