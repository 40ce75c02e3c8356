"""The dense product by torch's own matrix product: every device, differentiable; bits depend on the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moesys.kernels.experts.records import Weight
from moesys.kernels.formats import Int8Product, Int8Weight
from moesys.kernels.linear.rounding import round_activations

ROW_INVARIANT = False


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """See `moesys.kernels.linear.api.linear`. int8 weights are widened for the call."""
    if isinstance(weight, Int8Weight):
        if weight.product is Int8Product.W8A8:
            x = round_activations(x)
        return functional.linear(x, weight.unpack(x.dtype), bias)
    if weight.dtype is torch.bfloat16 and x.dtype is torch.float32:
        weight = weight.float()
    return functional.linear(x, weight, bias)
