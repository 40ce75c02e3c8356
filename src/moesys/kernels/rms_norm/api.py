"""The entry point of RMSNorm: checks the arguments and chooses by device and by whether gradients are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.rms_norm import closed_form, native, reference


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Computes x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (arXiv 1910.07467).

    x: (..., size) float. weight: (size,), same dtype. The statistics of bfloat16 are taken in float32. Returns the
    shape and dtype of ``x``. Raises `ShapeError`.

    torch computes it in one kernel on a GPU and in seven passes, each with a backward pass, on a CPU; without gradients
    one call in C does there, unless another kernel than native is asked for.
    """
    if weight.shape != x.shape[-1:]:
        raise ShapeError(f"the norm's weight has shape {tuple(weight.shape)}, x ends in {x.shape[-1]}")
    if native.takes(x, weight):
        return native.rms_norm(x, weight, epsilon)
    implementation = closed_form if x.device.type == "cpu" else reference
    return implementation.rms_norm(x, weight, epsilon)


def rms_norm_pair(
    x: Tensor, weights: tuple[Tensor, Tensor], widths: tuple[int, int], epsilon: float
) -> Tensor:
    """Normalises two parts of the last dimension that lie side by side, such as queries and keys: in one call in C
    where `rms_norm` is one.

    x: (..., columns) float. widths: columns of each part. weights: of each part, a divisor of its width; a part that
    holds its weight several times is as many groups, normalised one by one. Returns the shape and dtype of ``x``.
    Raises `ShapeError`.
    """
    if sum(widths) != x.shape[-1] or not all(map(_divides, weights, widths)):
        raise ShapeError(
            f"the norms' weights {[tuple(weight.shape) for weight in weights]} must divide the widths {widths}, and "
            f"these add up to the columns of x ({x.shape[-1]})"
        )
    if native.takes_pair(x, weights):
        return native.rms_norm_pair(x, weights, widths, epsilon)
    parts = zip(x.split(widths, dim=-1), weights, strict=True)
    return torch.cat([_normalize_groups(part, weight, epsilon) for part, weight in parts], dim=-1)


def _divides(weight: Tensor, width: int) -> bool:
    return weight.ndim == 1 and weight.shape[0] > 0 and width % weight.shape[0] == 0


def _normalize_groups(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if weight.shape == x.shape[-1:]:
        return rms_norm(x, weight, epsilon)
    return rms_norm(x.unflatten(-1, (-1, weight.shape[0])), weight, epsilon).flatten(-2)
