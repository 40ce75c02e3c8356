"""The rotary embedding of inference on a CPU in C: one call for all heads of all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.fork import require_threads
from moesys.kernels.inference_call import is_inference_call

_DTYPES = (torch.float32, torch.bfloat16)


def takes(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate_pairs` computes for these arguments, whose last dimensions are checked: the heads of a model's
    tokens, with the float32 angles of each token."""
    if (
        x.ndim != 4
        or x.dtype not in _DTYPES
        or cos.dtype is not torch.float32
        or sin.dtype is not torch.float32
    ):
        return False
    batch, sequence, _, size = x.shape
    if cos.shape != (batch, sequence, 1, size // 2) or not (cos.is_contiguous() and sin.is_contiguous()):
        return False
    batch_stride, token_stride, _, element_stride = x.stride()
    if element_stride != 1 or (batch > 1 and batch_stride != sequence * token_stride):
        return False
    return is_inference_call(x, cos, sin)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `moesys.kernels.rotary.api.rotate_pairs`."""
    require_threads()
    return native.rotate_pairs(x, cos, sin)
