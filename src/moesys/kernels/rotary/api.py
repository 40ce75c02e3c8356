"""The entry point of the rotary embedding (arXiv 2104.09864), in the half-split form of Llama checkpoints."""

from __future__ import annotations

from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.rotary import in_place, native


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + size / 2]) of the last dimension by its angle.

    x: (..., size) float, size even. cos, sin: broadcastable to (..., size / 2), cast to the dtype of ``x``; no
    gradient flows to them. Returns the shape and dtype of ``x``. Raises `ShapeError`.
    """
    if x.shape[-1] != 2 * cos.shape[-1] or cos.shape != sin.shape:
        raise ShapeError(
            f"x ends in {x.shape[-1]}, which must be twice the number of angles: "
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )
    if native.takes(x, cos, sin):
        return native.rotate_pairs(x, cos, sin)
    return in_place.rotate_pairs(x, cos.to(x.dtype), sin.to(x.dtype))
