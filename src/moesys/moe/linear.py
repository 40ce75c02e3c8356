"""The linear layers of every model: `torch.nn.Linear` in names and parameters, and its twin with int8 weights.

Which kernel computes a product is the operator's choice; whoever calls a layer need not know which of the two it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.kernels import Int8Product, Int8Weight, linear, pack_int8
from moesys.kernels.formats import GROUP_SIZE


class Linear(nn.Linear):
    """x @ weight^T + bias; which kernel computes it is the operator's choice."""

    def forward(self, input: Tensor) -> Tensor:
        """Takes (..., in_features), returns (..., out_features) in the dtype of the input."""
        return linear(input, self.weight, self.bias)


class QuantizedLinear(nn.Module):
    """x @ weight^T + bias with weights in int8 groups, for inference: buffers, never parameters. Made by
    `quantize_linear`.

    values, scales:  as in `Int8Weight`.
    bias:            (out_features,) in the dtype of the activations, or None.
    """

    values: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Int8Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.product = weight.product
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", bias)
        self._weight = weight

    @property
    def weight(self) -> Int8Weight:
        """(out_features, in_features). Raises `ShapeError` when the scales are no longer float32."""
        values, scales = self._buffers["values"], self._buffers["scales"]
        if values is not self._weight.values or scales is not self._weight.scales:
            # Other buffers since the last call, as after ``to`` or loading; a new record checks them once.
            self._weight = Int8Weight(self.values, self.scales, self.in_features, self.product)
        return self._weight

    def forward(self, input: Tensor) -> Tensor:
        """Takes (..., in_features), returns (..., out_features) in the dtype of the input."""
        return linear(input, self.weight, self.bias)


def quantize_linear(layer: nn.Linear, product: Int8Product = Int8Product.W8) -> QuantizedLinear:
    """Returns the layer with its weight rounded to int8 groups, on the same device, its bias shared.

    Lossy: a weight is off by up to half the scale of its group; ``w8a8`` rounds activations too. A layer on the meta
    device gives one there. Raises `ShapeError` when a weight is NaN or Inf.
    """
    weight = layer.weight.detach()
    packed = _outline_int8(weight, product) if weight.is_meta else pack_int8(weight, product)
    return QuantizedLinear(packed, None if layer.bias is None else layer.bias.detach())


def _outline_int8(weight: Tensor, product: Int8Product) -> Int8Weight:
    rows, columns = weight.shape
    groups = -(-columns // GROUP_SIZE)
    return Int8Weight(
        weight.new_empty(rows, groups * GROUP_SIZE, dtype=torch.int8),
        weight.new_empty(rows, groups, dtype=torch.float32),
        columns,
        product,
    )
