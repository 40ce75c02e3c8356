"""The entry point of the matrix product: torch's library, or ours where that one does not use the CPU it is on."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.choice import Kernel, read_wish
from moesys.kernels.fork import require_threads


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None, *, adds: bool = False) -> Tensor:
    """Computes left @ right, written or with ``adds`` added to ``out`` where one is given.

    left: (rows, depth), right: (depth, columns), out: (rows, columns); one dtype. Not differentiable and not
    row-invariant. Raises `KernelError` where ours computes in a process whose threads a fork has lost.
    """
    if prefers_native(left):
        result = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
        if native.fits_product(left, right, result):
            require_threads()
            native.compute_product(left, right, result, adds=adds)
            return result
    if out is None:
        return left @ right
    return out.addmm_(left, right) if adds else torch.mm(left, right, out=out)


def prefers_native(left: Tensor) -> bool:
    """Whether `multiply` takes our product where strides allow.

    MKL, which multiplies float32 in torch, runs at half of an AMD CPU's rate (it leaves AVX-512 to Intel's); there ours
    computes, unless `use_kernel` or ``MOESYS_KERNEL`` asks for another. In ``torch.compile`` torch's computes, which
    the compiler sees into.
    """
    if left.dtype is not torch.float32 or left.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return _prefers_native(read_wish())


@cache
def _prefers_native(wish: Kernel) -> bool:
    is_wanted = native.is_half_used_by_mkl() if wish is Kernel.AUTO else wish is Kernel.NATIVE
    return is_wanted and native.find_obstacle() is None
