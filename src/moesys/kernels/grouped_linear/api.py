"""The entry point of the grouped product: checks the arguments and chooses who computes."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.choice import Kernel, Obstacle, choose_kernel, is_torch_certain
from moesys.kernels.grouped_linear import native, reference, torch_product

_IMPLEMENTATIONS = {
    Kernel.REFERENCE: reference,
    Kernel.TORCH: torch_product,
    Kernel.NATIVE: native,
}


def grouped_linear(x_TGK: Tensor, weight_GNK: Tensor, kernel: Kernel = Kernel.AUTO) -> Tensor:
    """Computes y[t, g] = weight[g] @ x[t, g]: a matrix for each group of columns, such as an attention head.

    x_TGK: (tokens, groups, columns) float. weight_GNK: (groups, rows, columns), the dtype of ``x``, or bfloat16 under
    float32 ``x``; views are read where they lie, transposed ones too. Returns (tokens, groups, rows) in the dtype of
    ``x``. Raises `ShapeError`, and `KernelError` when the kernel asked for cannot take the call.

    ``auto`` takes the native kernel where no gradient is needed, which gives a token the same bits alone and among
    thousands: those of `moesys.kernels.linear` per group where rows of the weight are contiguous, and sums in the order
    of the columns where these are. In ``torch.compile`` torch computes, unless another kernel is asked for: that one
    breaks the graph.
    """
    _check(x_TGK, weight_GNK)
    if torch.compiler.is_compiling():
        if kernel is Kernel.TORCH or (kernel is Kernel.AUTO and is_torch_certain()):
            return torch_product.grouped_linear(x_TGK, weight_GNK)
    elif kernel is Kernel.AUTO and native.is_plain_call(x_TGK, weight_GNK):
        return native.grouped_linear(x_TGK, weight_GNK)

    def find_obstacle() -> Obstacle | None:
        return native.find_obstacle(x_TGK, weight_GNK)

    chosen = choose_kernel(
        "grouped_linear",
        kernel,
        {Kernel.NATIVE: find_obstacle, Kernel.TORCH: _none, Kernel.REFERENCE: _none},
    )
    return _IMPLEMENTATIONS[chosen].grouped_linear(x_TGK, weight_GNK)


def _none() -> None:
    """Torch and the reference take every checked call."""


def _check(x_TGK: Tensor, weight_GNK: Tensor) -> None:
    if x_TGK.ndim != 3 or weight_GNK.ndim != 3 or x_TGK.shape[1:] != weight_GNK.shape[::2]:
        raise ShapeError(
            "x must be (tokens, groups, columns) and the weight (groups, rows, columns) of as many groups and columns, "
            f"got {tuple(x_TGK.shape)} and {tuple(weight_GNK.shape)}"
        )
    widens = weight_GNK.dtype is torch.bfloat16 and x_TGK.dtype is torch.float32
    if not x_TGK.is_floating_point() or not (weight_GNK.dtype is x_TGK.dtype or widens):
        raise ShapeError(
            f"x is {x_TGK.dtype} but the weights are {weight_GNK.dtype}; cast x to the dtype of the weights"
        )
