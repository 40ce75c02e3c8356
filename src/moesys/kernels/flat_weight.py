"""Weights of any format as the flat arguments that an operator of torch can have: tensors, numbers and names."""

from __future__ import annotations

from torch import Tensor

from moesys.kernels.formats import Int8Product, Int8Weight
from moesys.kernels.records import Weight

FlatWeight = tuple[Tensor, Tensor | None, int, str]
"""Values, scales, columns, and the int8 product; no scales and an empty name for float weights."""


def flatten_weight(weight: Weight) -> FlatWeight:
    """Returns what `unflatten_weight` makes the weight of."""
    if isinstance(weight, Int8Weight):
        return weight.values, weight.scales, weight.num_columns, weight.product.value
    return weight, None, weight.shape[-1], ""


def unflatten_weight(values: Tensor, scales: Tensor | None, num_columns: int, product: str) -> Weight:
    """Returns the weight that these stand for."""
    return values if scales is None else Int8Weight(values, scales, num_columns, Int8Product(product))
