"""The dense product as an operator of torch, ``moesys::linear``, for graphs that ``torch.compile`` captures.

The compiler sees one opaque node. Which implementation computes is chosen when the node runs, by the rule of every
other call, so compiled and eager results have the same bits. Eager calls do not come this way: the dispatcher would
add several microseconds to a product that takes twenty.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from moesys.kernels.choice import Kernel
from moesys.kernels.derivatives import refuse_derivatives
from moesys.kernels.flat_weight import flatten_weight, unflatten_weight
from moesys.kernels.linear.implementations import compute_linear
from moesys.kernels.records import Weight

_SCHEMA = "(Tensor x, Tensor values, Tensor? scales, SymInt columns, str product, Tensor? bias, str kernel) -> Tensor"


def call_linear(x: Tensor, weight: Weight, bias: Tensor | None, kernel: Kernel) -> Tensor:
    """Calls the operator; arguments as `compute_linear`. Without gradients."""
    return torch.ops.moesys.linear.default(x, *flatten_weight(weight), bias, kernel.value)


@custom_op("moesys::linear", mutates_args=(), schema=_SCHEMA)
def _linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor | None,
    columns: int,
    product: str,
    bias: Tensor | None,
    kernel: str,
) -> Tensor:
    with torch.no_grad():
        return compute_linear(x, unflatten_weight(values, scales, columns, product), bias, Kernel(kernel))


@_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    scales: Tensor | None,
    columns: int,
    product: str,
    bias: Tensor | None,
    kernel: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


refuse_derivatives(_linear)
