"""The entry point of the dense product: checks the arguments, chooses an implementation, calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.choice import Kernel, choose_kernel
from moesys.kernels.formats import Int8Weight
from moesys.kernels.linear import native, reference, torch_product
from moesys.kernels.records import Weight

_IMPLEMENTATIONS = {
    Kernel.REFERENCE: reference,
    Kernel.TORCH: torch_product,
    Kernel.NATIVE: native,
}


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, kernel: Kernel = Kernel.AUTO) -> Tensor:
    """Computes x @ weight^T + bias.

    x: (..., columns) float. weight: (rows, columns), the dtype of ``x``, bfloat16 under float32 ``x``, or int8.
    bias: (rows,), the dtype of ``x``. Returns (..., rows) in the dtype of ``x``. Raises `ShapeError`, and
    `KernelError` when the kernel asked for cannot take the call.

    ``auto`` takes the native kernel where no gradient is needed, which gives a row the same bits alone and among
    thousands, and torch elsewhere.
    """
    _check(x, weight, bias)
    return _IMPLEMENTATIONS[_choose(x, weight, bias, kernel)].linear(x, weight, bias)


def _choose(x: Tensor, weight: Weight, bias: Tensor | None, kernel: Kernel) -> Kernel:
    def find_obstacle() -> str | None:
        return native.find_obstacle(x, weight, bias)

    return choose_kernel(
        "linear", kernel, {Kernel.NATIVE: find_obstacle, Kernel.TORCH: _none, Kernel.REFERENCE: _none}
    )


def _none() -> None:
    """Torch and the reference take every checked call."""


def _check(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise ShapeError(f"x must be floating point, got {x.dtype}; cast it to the dtype of the weights")
    if x.ndim == 0 or len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"weight must be (rows, columns) with as many columns as x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if not (isinstance(weight, Int8Weight) or weight.dtype == x.dtype or _widens(weight, x) or _autocasts(x)):
        raise ShapeError(
            f"x is {x.dtype} but the weights are {weight.dtype}; cast x to the dtype of the weights"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ShapeError(
            f"bias must be ({weight.shape[0]},) of {x.dtype}, got {tuple(bias.shape)} of {bias.dtype}"
        )


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _widens(weight: Tensor, x: Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and x.dtype is torch.float32
