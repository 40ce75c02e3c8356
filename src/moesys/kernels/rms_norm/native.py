"""RMSNorm of inference on a CPU in C: one call where torch takes seven. A row's bits never depend on others."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.fork import require_threads
from moesys.kernels.inference_call import is_inference_call

ROW_INVARIANT = True
_DTYPES = (torch.float32, torch.bfloat16)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` computes for these arguments, whose shapes are checked."""
    return x.dtype in _DTYPES and weight.dtype is x.dtype and is_inference_call(x, weight)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `moesys.kernels.rms_norm.api.rms_norm`."""
    require_threads()
    return native.compute_rms_norm(x.contiguous(), weight.contiguous(), epsilon)


def takes_pair(x: Tensor, weights: tuple[Tensor, Tensor]) -> bool:
    """Whether `rms_norm_pair` computes for these arguments, whose shapes are checked."""
    first, second = weights
    dtype = x.dtype
    same = dtype in _DTYPES and first.dtype is dtype and second.dtype is dtype
    return same and x.ndim > 1 and x.stride(-1) == 1 and is_inference_call(x, first, second)


def rms_norm_pair(
    x: Tensor, weights: tuple[Tensor, Tensor], widths: tuple[int, int], epsilon: float
) -> Tensor:
    """See `moesys.kernels.rms_norm.api.rms_norm_pair`."""
    require_threads()
    first, second = weights
    if not (x.is_contiguous() or x.numel() == x.shape[-2] * x.shape[-1]):
        x = x.contiguous()
    return native.compute_rms_norm_pair(x, (first.contiguous(), second.contiguous()), widths, epsilon)
