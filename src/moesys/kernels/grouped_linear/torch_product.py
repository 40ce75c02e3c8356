"""The grouped product by torch: every device, differentiable; bits depend on the number of rows."""

from __future__ import annotations

from torch import Tensor

ROW_INVARIANT = False


def grouped_linear(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    """See `moesys.kernels.grouped_linear.api.grouped_linear`."""
    y_GTN = x_TGK.transpose(0, 1) @ weight_GNK.to(x_TGK.dtype).transpose(1, 2)
    return y_GTN.transpose(0, 1)
