"""Which calls the native kernels take, for every operator that has one: what they compute and what torch does around.

Knows nothing of particular operators. Reads shapes, dtypes and modes, never a value of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.choice import Obstacle
from moesys.kernels.derivatives import is_transformed, is_watched
from moesys.kernels.formats import Int8Weight
from moesys.kernels.records import Weight


def find_native_obstacle(
    x: Tensor, weights: Sequence[Weight], others: Sequence[Tensor | None]
) -> Obstacle | None:
    """Returns why the native kernels cannot take a call with these tensors, or None."""
    if is_transformed(x, *weights, *others):
        return Obstacle("it knows no tangents and no transforms of torch.func")
    reason = native.find_call_obstacle(x, weights, others)
    if reason is None:
        return None
    return Obstacle(reason, _find_fix(x, weights, others))


def _find_fix(x: Tensor, weights: Sequence[Weight], others: Sequence[Tensor | None]) -> str | None:
    """What would let a native kernel take a call of inference that it refused."""
    needs_gradient = any(is_watched(value) for value in (x, *weights, *others))
    if needs_gradient or x.device.type != "cpu" or native.find_obstacle() is not None:
        return None
    if torch.is_autocast_enabled("cpu"):
        return "cast the model to bfloat16 instead of using autocast"
    tensors = [part for weight in weights for part in _list_parts(weight)]
    if torch.float16 in (x.dtype, *(tensor.dtype for tensor in tensors)):
        return "cast the model to bfloat16 or float32"
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "store the weights contiguously (Tensor.contiguous)"
    return None


def _list_parts(weight: Weight) -> tuple[Tensor, ...]:
    return (weight.values, weight.scales) if isinstance(weight, Int8Weight) else (weight,)
