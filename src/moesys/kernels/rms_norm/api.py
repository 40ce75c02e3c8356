"""The entry point of RMSNorm: checks the arguments and chooses by device and by whether gradients are wanted."""

from __future__ import annotations

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
