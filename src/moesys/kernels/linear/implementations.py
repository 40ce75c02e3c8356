"""The implementations of the dense product and the choice among them, for arguments that are checked."""

from __future__ import annotations

from torch import Tensor

from moesys.kernels.choice import Kernel, Obstacle, choose_kernel, use_kernel
from moesys.kernels.linear import native, reference, torch_product
from moesys.kernels.records import Weight

_IMPLEMENTATIONS = {
    Kernel.REFERENCE: reference,
    Kernel.TORCH: torch_product,
    Kernel.NATIVE: native,
}


def compute_linear(x: Tensor, weight: Weight, bias: Tensor | None, kernel: Kernel) -> Tensor:
    """See `moesys.kernels.linear.api.linear`."""

    def find_obstacle() -> Obstacle | None:
        return native.find_obstacle(x, weight, bias)

    obstacles = {Kernel.NATIVE: find_obstacle, Kernel.TORCH: _none, Kernel.REFERENCE: _none}
    chosen = choose_kernel("linear", kernel, obstacles)
    with use_kernel(kernel):
        return _IMPLEMENTATIONS[chosen].linear(x, weight, bias)


def _none() -> None:
    """Torch and the reference take every checked call."""
