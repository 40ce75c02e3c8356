"""The dense product on a CPU in C: weights are read once, sums are float32, a row's bits never depend on others."""

from __future__ import annotations

from torch import Tensor

from moesys.kernels import native
from moesys.kernels.choice import Obstacle
from moesys.kernels.fork import require_threads
from moesys.kernels.native_calls import find_native_obstacle
from moesys.kernels.records import Weight

ROW_INVARIANT = True


def find_obstacle(x: Tensor, weight: Weight, bias: Tensor | None) -> Obstacle | None:
    """Returns why the native kernel cannot take a call, or None."""
    return find_native_obstacle(x, [weight], [bias])


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """See `moesys.kernels.linear.api.linear`."""
    require_threads()
    x_RK = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y_RN = native.compute_linear(x_RK, weight, None if bias is None else bias.float())
    y = y_RN if x.ndim == 2 else y_RN.view(*x.shape[:-1], weight.shape[0])
    return y.to(x.dtype)
