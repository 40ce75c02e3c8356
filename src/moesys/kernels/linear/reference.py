"""The specification of the dense product, in plain differentiable torch. Works in float64."""

from __future__ import annotations

from torch import Tensor

from moesys.kernels.formats import Int8Product, Int8Weight
from moesys.kernels.linear.rounding import round_activations
from moesys.kernels.records import Weight

ROW_INVARIANT = True


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """See `moesys.kernels.linear.api.linear`."""
    if isinstance(weight, Int8Weight):
        if weight.product is Int8Product.W8A8:
            x = round_activations(x)
        weight = weight.unpack(x.dtype)
    y = (x.unsqueeze(-2) * weight.to(x.dtype)).sum(dim=-1)
    return y if bias is None else y + bias
