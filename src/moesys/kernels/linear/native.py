"""The dense product on a CPU in C: weights are read once, sums are float32, a row's bits never depend on others."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.choice import Obstacle
from moesys.kernels.derivatives import is_transformed
from moesys.kernels.fork import require_threads
from moesys.kernels.formats import Int8Weight
from moesys.kernels.native_calls import find_native_obstacle
from moesys.kernels.records import Weight

ROW_INVARIANT = True
_DTYPES = (torch.float32, torch.bfloat16)


def is_plain_call(x: Tensor, weight: Weight) -> bool:
    """Whether a call without bias is one of decoding: without gradients, of matching shapes and dtypes, contiguous on a
    CPU. A yes stands for every check of the operator, at a third of their time; a no says nothing.

    One row through a small matrix takes 60 us, and between two reads of weights every line of Python is cold.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_transformed(x, weight):
        return False
    if isinstance(weight, Int8Weight):
        values, columns = weight.values, (weight.num_columns,)
        if not (weight.scales.is_cpu and weight.scales.is_contiguous()):
            return False
    else:
        values, columns = weight, weight.shape[-1:]
        if weight.dtype is not torch.bfloat16 and weight.dtype is not x.dtype:
            return False
    return (
        x.dtype in _DTYPES
        and values.ndim == 2
        and x.shape[-1:] == columns
        and x.is_cpu
        and values.is_cpu
        and x.is_contiguous()
        and values.is_contiguous()
        and native.find_obstacle() is None
    )


def find_obstacle(x: Tensor, weight: Weight, bias: Tensor | None) -> Obstacle | None:
    """Returns why the native kernel cannot take a call, or None."""
    return find_native_obstacle(x, [weight], [bias])


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """See `moesys.kernels.linear.api.linear`."""
    require_threads()
    return native.compute_linear(x.contiguous(), weight, None if bias is None else bias.float().contiguous())
