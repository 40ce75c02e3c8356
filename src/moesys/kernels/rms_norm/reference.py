"""The specification of RMSNorm, as torch has it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `moesys.kernels.rms_norm.api.rms_norm`."""
    return functional.rms_norm(x, weight.shape, weight, epsilon)
