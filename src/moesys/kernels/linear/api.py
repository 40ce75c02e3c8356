"""The entry point of the dense product: checks the arguments, then computes or, in a compiler, puts down a node."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.choice import Kernel, is_torch_certain, wants_native
from moesys.kernels.derivatives import is_transformed, is_watched
from moesys.kernels.formats import Int8Weight
from moesys.kernels.linear import native, torch_product
from moesys.kernels.linear.implementations import compute_linear
from moesys.kernels.linear.operator import call_linear
from moesys.kernels.records import Weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, kernel: Kernel = Kernel.AUTO) -> Tensor:
    """Computes x @ weight^T + bias.

    x: (..., columns) float. weight: (rows, columns), the dtype of ``x``, bfloat16 under float32 ``x``, or int8.
    bias: (rows,), the dtype of ``x``. Returns (..., rows) in the dtype of ``x``. Raises `ShapeError`, and
    `KernelError` when the kernel asked for cannot take the call.

    ``auto`` takes the native kernel where no gradient is needed, which gives a row the same bits alone and among
    thousands, and torch elsewhere. In ``torch.compile`` calls without derivatives on a CPU are the operator
    ``moesys::linear`` and others torch's own product, unless another kernel is asked for: that one breaks the graph.
    ``MOESYS_KERNEL`` counts as it was when the graph was captured.
    """
    is_compiling = torch.compiler.is_compiling()
    if bias is None and not is_compiling and native.is_plain_call(x, weight) and wants_native(kernel):
        return native.linear(x, weight, None)
    _check(x, weight, bias)
    if is_compiling:
        return _trace(x, weight, bias, kernel)
    return compute_linear(x, weight, bias, kernel)


def _trace(x: Tensor, weight: Weight, bias: Tensor | None, kernel: Kernel) -> Tensor:
    """Puts the product into the graph that is being captured."""
    is_derived = is_transformed(x, weight, bias) or any(is_watched(value) for value in (x, weight, bias))
    if x.device.type == "cpu" and not is_derived and not _autocasts(x):
        return call_linear(x, weight, bias, kernel)
    if kernel is Kernel.TORCH or (kernel is Kernel.AUTO and is_torch_certain()):
        return torch_product.linear(x, weight, bias)
    return compute_linear(x, weight, bias, kernel)


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
