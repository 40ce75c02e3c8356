"""The entry point of the matrix product: torch's library, or ours where that one does not use the CPU it is on."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.choice import Kernel, read_override


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None, *, adds: bool = False) -> Tensor:
    """Computes left @ right, written or with ``adds`` added to ``out`` where one is given.

    left: (rows, depth), right: (depth, columns), out: (rows, columns); one dtype. Not differentiable and not
    row-invariant. MKL, which multiplies float32 in torch, runs at half of an AMD CPU's rate (it leaves AVX-512 to
    Intel's); there ours computes, unless ``MOESYS_KERNEL`` says otherwise.
    """
    if left.dtype is torch.float32 and left.device.type == "cpu" and _prefers_native(read_override()):
        result = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
        if native.fits_product(left, right, result):
            native.compute_product(left, right, result, adds=adds)
            return result
    if out is None:
        return left @ right
    return out.addmm_(left, right) if adds else torch.mm(left, right, out=out)


@cache
def _prefers_native(override: Kernel) -> bool:
    is_wanted = native.is_half_used_by_mkl() if override is Kernel.AUTO else override is Kernel.NATIVE
    return is_wanted and native.find_obstacle() is None
