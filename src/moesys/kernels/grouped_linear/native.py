"""The grouped product on a CPU in C: weights are read once and where they lie, a row's bits never depend on others."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.choice import Obstacle
from moesys.kernels.fork import require_threads
from moesys.kernels.inference_call import is_inference_call
from moesys.kernels.native_calls import find_native_obstacle

ROW_INVARIANT = True
_DTYPES = (torch.float32, torch.bfloat16)


def is_plain_call(x_TGK: Tensor, weight_GNK: Tensor) -> bool:
    """Whether a checked call is one of inference that the kernel takes. A no says nothing."""
    return (
        x_TGK.dtype in _DTYPES
        and weight_GNK.dtype in _DTYPES
        and native.fits_grouped_linear(weight_GNK)
        and not torch.is_autocast_enabled("cpu")
        and is_inference_call(x_TGK, weight_GNK)
    )


def find_obstacle(x_TGK: Tensor, weight_GNK: Tensor) -> Obstacle | None:
    """Returns why the native kernel cannot take a checked call, or None."""
    obstacle = find_native_obstacle(x_TGK, [], [weight_GNK])
    if obstacle is None and not native.fits_grouped_linear(weight_GNK):
        return Obstacle("it takes matrices with contiguous rows or columns", "store the weights contiguously")
    return obstacle


def grouped_linear(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    """See `moesys.kernels.grouped_linear.api.grouped_linear`."""
    require_threads()
    return native.compute_grouped_linear(x_TGK if x_TGK.stride(2) == 1 else x_TGK.contiguous(), weight_GNK)
