"""The native kernels as Python functions: C structures, pointers and nothing else.

Loaded through ctypes after torch, so that OpenMP resolves to the runtime that torch has loaded: there is one, and
the number of threads follows torch. A process must not fork after the first call.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesys import env
from moesys.errors import KernelError, ShapeError
from moesys.kernels.formats import GROUP_SIZE, Int8Product, Int8Weight
from moesys.kernels.native.build import build_library
from moesys.kernels.native.cpu_level import find_cpu_level
from moesys.kernels.records import Activation, BankView, Rows, Weight

_LANES_OF_CORRECTION = 16
_FLOAT32: Any = {"dtype": torch.float32, "device": "cpu"}
_ACTIVATIONS = (Activation.SWIGLU, Activation.CLAMPED_SWIGLU, Activation.GELU, Activation.RELU)


class WeightFormat(IntEnum):
    """In the order of ``weight_format`` in operands.h."""

    F32 = 0
    BF16 = 1
    W8 = 2
    W8A8 = 3


class _Matrix(Structure):
    _fields_ = (
        ("format", c_int32),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
    )


class _Activations(Structure):
    _fields_ = (
        ("values", c_void_p),
        ("rounded", c_void_p),
        ("scales", c_void_p),
        ("corrections", c_void_p),
        ("columns", c_int64),
    )


class _LinearCall(Structure):
    _fields_ = (
        ("x", _Activations),
        ("rows", c_int64),
        ("w", _Matrix),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("threads", c_int32),
    )


class _ProductCall(Structure):
    _fields_ = (
        ("a", c_void_p),
        ("a_row", c_int64),
        ("a_column", c_int64),
        ("b", c_void_p),
        ("b_row", c_int64),
        ("c", c_void_p),
        ("c_row", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("depth", c_int64),
        ("accumulate", c_int32),
        ("threads", c_int32),
    )


class _ExpertsCall(Structure):
    _fields_ = (
        ("x", _Activations),
        ("row_ids", c_void_p),
        ("offsets", c_void_p),
        ("slots", c_void_p),
        ("num_experts", c_int64),
        ("num_rows", c_int64),
        ("num_assignments", c_int64),
        ("num_slots", c_int64),
        ("gate_up", _Matrix),
        ("down", _Matrix),
        ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("activation", c_int32),
        ("limit", c_float),
        ("alpha", c_float),
        ("inner", c_int64),
        ("inner_rows", _Activations),
        ("y", c_void_p),
        ("threads", c_int32),
    )


@cache
def load_library() -> ctypes.CDLL:
    """Returns the library for this CPU, built on first use. Raises `KernelError`."""
    path = build_library(find_cpu_level())
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the native kernels {path} cannot be loaded: {error}; delete the file") from error
    runtimes = find_openmp_runtimes()
    if len(runtimes) > 1:
        raise KernelError(
            f"two OpenMP runtimes would fight over the cores: {', '.join(sorted(runtimes))}; set CC to the compiler "
            "whose runtime torch uses (gcc)"
        )
    library.moesys_linear.argtypes = (POINTER(_LinearCall),)
    library.moesys_linear.restype = None
    library.moesys_experts.argtypes = (POINTER(_ExpertsCall),)
    library.moesys_experts.restype = ctypes.c_int
    library.moesys_product.argtypes = (POINTER(_ProductCall),)
    library.moesys_product.restype = ctypes.c_int
    library.moesys_multiplies_bf16.argtypes = ()
    library.moesys_multiplies_bf16.restype = ctypes.c_int
    library.moesys_read.argtypes = (c_void_p, c_int64, c_int32)
    library.moesys_read.restype = c_float
    return library


def find_openmp_runtimes() -> set[str]:
    """Returns the OpenMP libraries in this process, by path; none where the system does not list them."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[-1] for line in lines}
    return {path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))}


@cache
def find_obstacle() -> str | None:
    """Returns why the native kernels cannot be used here, or None. Said once in the log.

    Raises `KernelError` when the compiler or CPU level that the user named is the reason.
    """
    try:
        load_library()
    except KernelError as error:
        if env.read_cpu_level() is not None or env.read_compiler() is not None:
            raise
        logging.getLogger("moesys").warning("native CPU kernels are off, torch computes instead: %s", error)
        return str(error)
    return None


def find_call_obstacle(x: Tensor, weights: Sequence[Weight], others: Sequence[Tensor | None]) -> str | None:
    """Returns why the native kernels cannot take a call with these tensors, or None."""
    if x.device.type != "cpu":
        return f"it runs on CPU tensors and x is on {x.device}"
    tensors = [tensor for tensor in (*weights, *others) if tensor is not None]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return f"it runs on CPU tensors; some are on {[str(tensor.device) for tensor in tensors]}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 or bfloat16 rows, x is {x.dtype}"
    for weight in weights:
        if find_format(weight) is None:
            return "it takes float32, bfloat16 and int8 weights"
        parts = (weight.values, weight.scales) if isinstance(weight, Int8Weight) else (weight,)
        if not all(part.is_contiguous() for part in parts):
            return "it takes contiguous weights"
    if torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (x, *weights, *others)
    ):
        return "it has no backward pass and a gradient is needed"
    if torch.is_autocast_enabled("cpu"):
        return "it does not follow autocast"
    return find_obstacle()


def find_format(weight: Weight) -> WeightFormat | None:
    """Returns the format of a weight, or None for one that the native kernels do not take."""
    if isinstance(weight, Int8Weight):
        return WeightFormat.W8 if weight.product is Int8Product.W8 else WeightFormat.W8A8
    return {torch.float32: WeightFormat.F32, torch.bfloat16: WeightFormat.BF16}.get(weight.dtype)


def compute_linear(x_RK: Tensor, weight: Weight, bias_N: Tensor | None) -> Tensor:
    """Computes x @ weight^T + bias in float32 for (rows, columns) float32 or bfloat16 ``x``."""
    num_rows, num_columns = x_RK.shape[0], weight.shape[0]
    x, w = _Buffers(x_RK, weight), _pack_matrix(weight)
    y_RN = torch.empty(num_rows, num_columns, **_FLOAT32)
    bias_N = None if bias_N is None else bias_N.contiguous()
    call = _LinearCall(x.record, num_rows, w, _point(bias_N), y_RN.data_ptr(), torch.get_num_threads())
    load_library().moesys_linear(ctypes.byref(call))
    return y_RN


def compute_experts(rows: Rows, view: BankView) -> Tensor:
    """Computes float32 rows per assignment for float32 or bfloat16 ``rows.x_RD``; biases are float32. Rows of experts
    that the view does not hold are zero."""
    inner = view.gate_up_SFD.shape[1] // view.form.num_halves
    hidden = rows.x_RD.shape[1]
    slots = view.slot_of_expert
    if slots is None:
        slots = torch.arange(view.num_slots, device="cpu")
    new_rows = torch.empty if view.covers_all else torch.zeros
    y_AD = new_rows(rows.num_assignments, hidden, **_FLOAT32)
    x = _Buffers(rows.x_RD, view.gate_up_SFD)
    inner_rows = _Buffers(_new_padded(rows.num_assignments, inner, view.down_SDF), view.down_SDF)
    if rows.x_RD.dtype is torch.bfloat16 and find_format(view.down_SDF) is WeightFormat.BF16:
        inner_rows.add_halves()
    kept = [t.contiguous() for t in (rows.row_ids, rows.offsets, slots)]
    gate_up_bias, down_bias = (
        None if bias is None else bias.contiguous() for bias in (view.gate_up_bias_SF, view.down_bias_SD)
    )
    call = _ExpertsCall(
        x=x.record,
        row_ids=kept[0].data_ptr(),
        offsets=kept[1].data_ptr(),
        slots=kept[2].data_ptr(),
        num_experts=rows.num_experts,
        num_rows=rows.x_RD.shape[0],
        num_assignments=rows.num_assignments,
        num_slots=view.num_slots,
        gate_up=_pack_matrix(view.gate_up_SFD),
        down=_pack_matrix(view.down_SDF),
        gate_up_bias=_point(gate_up_bias),
        down_bias=_point(down_bias),
        activation=_ACTIVATIONS.index(view.form.activation),
        limit=view.form.limit,
        alpha=view.form.alpha,
        inner=inner,
        inner_rows=inner_rows.record,
        y=y_AD.data_ptr(),
        threads=torch.get_num_threads(),
    )
    status = load_library().moesys_experts(ctypes.byref(call))
    if status == 1:
        raise MemoryError("the native expert kernel found no memory for its list of experts")
    if status == 2:
        raise ShapeError(
            f"row_ids must be in 0..{rows.x_RD.shape[0] - 1}, slots in -1..{view.num_slots - 1}, and offsets must rise "
            f"from 0 to the number of assignments ({rows.num_assignments}); one of them does not"
        )
    return y_AD


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
        x = _Activations(values=left.data_ptr(), columns=left.shape[1])
        w = _Matrix(int(WeightFormat.F32), right.data_ptr(), None, right.shape[1], right.shape[0])
        call = _LinearCall(x, left.shape[0], w, None, product.data_ptr(), threads)
        load_library().moesys_linear(ctypes.byref(call))
        if adds:
            out.add_(product)
        return
    shape = (left.shape[0], right.shape[1], left.shape[1])
    call = _ProductCall(
        left.data_ptr(), *left.stride(), right.data_ptr(), right.stride(0), out.data_ptr(), out.stride(0), *shape,
        int(adds), threads,
    )  # fmt: skip
    if load_library().moesys_product(ctypes.byref(call)):
        raise MemoryError("the native product found no memory for its panels")


def read_memory(buffer: Tensor) -> float:
    """Reads a float32 buffer once with all threads and returns its sum; for measuring the rate."""
    return load_library().moesys_read(buffer.data_ptr(), buffer.numel(), torch.get_num_threads())


class _Buffers:
    """Activations as a weight's format wants them, and the memory behind the pointers."""

    def __init__(self, x_RK: Tensor, weight: Weight) -> None:
        num_rows, columns = x_RK.shape
        form = find_format(weight)
        if x_RK.dtype is torch.bfloat16 and form is WeightFormat.BF16 and _multiplies_bf16():
            self._rounded = x_RK.contiguous()
            self.record = _Activations(rounded=self._rounded.data_ptr(), columns=columns)
            return
        x_RK = x_RK.float()
        if isinstance(weight, Int8Weight) and weight.values.shape[-1] != columns:
            x_RK = torch.nn.functional.pad(x_RK, (0, weight.values.shape[-1] - columns))
            columns = weight.values.shape[-1]
        self._values = x_RK.contiguous()
        self.record = _Activations(values=self._values.data_ptr(), columns=columns)
        if form is WeightFormat.W8A8:
            num_groups = num_rows * columns // GROUP_SIZE
            sizes = (4 * _LANES_OF_CORRECTION * num_groups, GROUP_SIZE * num_groups, 4 * num_groups)
            self._rounded = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
            self.record.corrections = start = self._rounded.data_ptr()
            self.record.rounded = start + sizes[0]
            self.record.scales = start + sizes[0] + sizes[1]

    def add_halves(self) -> None:
        """Makes room for the bfloat16 form, which the kernel fills, on CPUs that multiply it."""
        if _multiplies_bf16():
            self._rounded = torch.empty(self._values.shape, dtype=torch.bfloat16, device="cpu")
            self.record.rounded = self._rounded.data_ptr()


@cache
def _multiplies_bf16() -> bool:
    return bool(load_library().moesys_multiplies_bf16())


def _new_padded(num_rows: int, columns: int, weight: Weight) -> Tensor:
    """Rows that the kernel fills; zero beyond the columns where the weight's format pads."""
    if isinstance(weight, Int8Weight) and weight.values.shape[-1] != columns:
        return torch.zeros(num_rows, weight.values.shape[-1], **_FLOAT32)
    return torch.empty(num_rows, columns, **_FLOAT32)


def _pack_matrix(weight: Weight) -> _Matrix:
    values = weight.values if isinstance(weight, Int8Weight) else weight
    scales = weight.scales if isinstance(weight, Int8Weight) else None
    form = find_format(weight)
    assert form is not None
    assert values.is_contiguous()
    return _Matrix(int(form), values.data_ptr(), _point(scales), values.shape[-2], values.shape[-1])


def _point(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
