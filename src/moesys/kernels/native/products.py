"""Products of matrices in C, and the rate at which memory can be read, which bounds those of few rows."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from moesys.kernels.fork import require_threads
from moesys.kernels.formats import Int8Product, Int8Weight
from moesys.kernels.native.library import load_library
from moesys.kernels.native.operands import require_readable
from moesys.kernels.native.structures import LinearCall, ProductCall
from moesys.kernels.native.weight_format import WeightFormat
from moesys.kernels.records import Weight

_F32, _BF16, _W8, _W8A8 = (int(form) for form in WeightFormat)


def compute_linear(x: Tensor, weight: Weight, bias_N: Tensor | None) -> Tensor:
    """Computes x @ weight^T + bias for (..., columns) float32 or bfloat16 ``x``, in its dtype; sums are float32.

    x, weight: contiguous. bias_N: contiguous float32.
    """
    if isinstance(weight, Int8Weight):
        values, scales = weight.values, weight.scales.data_ptr()
        form = _W8A8 if weight.product is Int8Product.W8A8 else _W8
    else:
        values, scales = weight, None
        form = _BF16 if weight.dtype is torch.bfloat16 else _F32
    *leading, columns = x.shape
    num_outputs, stored_columns = values.shape
    y = x.new_empty((*leading, num_outputs))
    call = LinearCall(
        x.data_ptr(), x.dtype is torch.bfloat16, math.prod(leading), columns,
        form, values.data_ptr(), scales, num_outputs, stored_columns,
        None if bias_N is None else bias_N.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if load_library().moesys_linear(ctypes.byref(call)):
        raise MemoryError("the native product found no memory for rows in the format of its weights")
    return y


def fits_product(left: Tensor, right: Tensor, out: Tensor) -> bool:
    """Whether `compute_product` takes matrices of such strides: rows or columns of each lie contiguous."""
    matrices = (left, right, out)
    if any(m.dtype is not torch.float32 or m.device.type != "cpu" or 0 in m.shape for m in matrices):
        return False
    if left.shape[1] != right.shape[0] or out.shape != (left.shape[0], right.shape[1]) or out.stride(1) != 1:
        return False
    is_transposed = right.stride(1) != 1
    if is_transposed:
        return right.t().is_contiguous() and left.is_contiguous() and out.is_contiguous()
    return 1 in left.stride()


def compute_product(left: Tensor, right: Tensor, out: Tensor, *, adds: bool) -> None:
    """Computes float32 left @ right into ``out``, or adds it."""
    threads = torch.get_num_threads()
    if right.stride(1) != 1:
        product = torch.empty_like(out) if adds else out
        w = (_F32, right.data_ptr(), None, right.shape[1], right.shape[0])
        call = LinearCall(left.data_ptr(), 0, *left.shape, *w, None, product.data_ptr(), threads)
        load_library().moesys_linear(ctypes.byref(call))
        if adds:
            out.add_(product)
        return
    shape = (left.shape[0], right.shape[1], left.shape[1])
    call = ProductCall(
        left.data_ptr(), *left.stride(), right.data_ptr(), right.stride(0), out.data_ptr(), out.stride(0), *shape,
        int(adds), threads,
    )  # fmt: skip
    if load_library().moesys_product(ctypes.byref(call)):
        raise MemoryError("the native product found no memory for its panels")


def read_memory(buffer: Tensor) -> float:
    """Reads a float32 buffer once with all threads and returns its sum; for measuring the rate. Raises `KernelError`
    where a fork has lost the threads."""
    require_readable(torch.float32, buffer)
    require_threads()
    return load_library().moesys_read(buffer.data_ptr(), buffer.numel(), torch.get_num_threads())
