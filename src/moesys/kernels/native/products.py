"""Products of matrices in C, and the rate at which memory can be read, which bounds those of few rows."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moesys.kernels.fork import require_threads
from moesys.kernels.native.library import load_library
from moesys.kernels.native.operands import FLOAT32, ActivationBuffers, pack_matrix, point, require_readable
from moesys.kernels.native.structures import Activations, LinearCall, Matrix, ProductCall
from moesys.kernels.native.weight_format import WeightFormat
from moesys.kernels.records import Weight


def compute_linear(x_RK: Tensor, weight: Weight, bias_N: Tensor | None) -> Tensor:
    """Computes x @ weight^T + bias in float32 for (rows, columns) float32 or bfloat16 ``x``."""
    num_rows, num_columns = x_RK.shape[0], weight.shape[0]
    x, w = ActivationBuffers(x_RK, weight), pack_matrix(weight)
    y_RN = torch.empty(num_rows, num_columns, **FLOAT32)
    bias_N = None if bias_N is None else bias_N.contiguous()
    call = LinearCall(x.record, num_rows, w, point(bias_N), y_RN.data_ptr(), torch.get_num_threads())
    load_library().moesys_linear(ctypes.byref(call))
    return y_RN


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
        x = Activations(values=left.data_ptr(), columns=left.shape[1])
        w = Matrix(int(WeightFormat.F32), right.data_ptr(), None, right.shape[1], right.shape[0])
        call = LinearCall(x, left.shape[0], w, None, product.data_ptr(), threads)
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
