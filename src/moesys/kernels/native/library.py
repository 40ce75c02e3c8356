"""The library of native kernels: loaded once, and whether it can be used here and by a call.

Loaded through ctypes after torch, so that OpenMP resolves to the runtime that torch has loaded: there is one, and
the number of threads follows torch. A process must not fork after the first call.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moesys import env
from moesys.errors import KernelError
from moesys.kernels.formats import Int8Weight
from moesys.kernels.native.build import build_library
from moesys.kernels.native.cpu_level import find_cpu_level
from moesys.kernels.native.structures import (
    AttentionCall,
    ChoiceCall,
    ExpertsCall,
    GroupedLinearCall,
    GroupingCall,
    LinearCall,
    ProductCall,
    RMSNormCall,
    RotaryCall,
    RowSumCall,
    TopKCall,
    WeighingCall,
)
from moesys.kernels.native.weight_format import find_format
from moesys.kernels.records import Weight

_FUNCTIONS = (
    ("moesys_linear", LinearCall, c_int),
    ("moesys_grouped_linear", GroupedLinearCall, c_int),
    ("moesys_experts", ExpertsCall, c_int),
    ("moesys_product", ProductCall, c_int),
    ("moesys_sum_rows", RowSumCall, c_int),
    ("moesys_rms_norm", RMSNormCall, None),
    ("moesys_rotate", RotaryCall, None),
    ("moesys_attend_pages", AttentionCall, c_int),
    ("moesys_top_k", TopKCall, None),
    ("moesys_choose", ChoiceCall, c_int),
    ("moesys_weigh", WeighingCall, c_int),
    ("moesys_group", GroupingCall, c_int),
)
"""Name, structure of the one argument, result."""


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
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    for name, structure, result in _FUNCTIONS:
        function = getattr(library, name)
        function.argtypes = (POINTER(structure),)
        function.restype = result
    library.moesys_multiplies_bf16.argtypes = ()
    library.moesys_multiplies_bf16.restype = c_int
    library.moesys_read.argtypes = (c_void_p, c_int64, c_int32)
    library.moesys_read.restype = c_float


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
    if not x.is_cpu:
        return f"it runs on CPU tensors and x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 or bfloat16 rows, x is {x.dtype}"
    tensors = [x]
    for weight in weights:
        if find_format(weight) is None:
            return "it takes float32, bfloat16 and int8 weights"
        parts = (weight.values, weight.scales) if isinstance(weight, Int8Weight) else (weight,)
        for part in parts:
            if not part.is_contiguous():
                return "it takes contiguous weights"
        tensors += parts
    tensors += [tensor for tensor in others if tensor is not None]
    needs_gradient = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"it runs on CPU tensors; they are on {[str(tensor.device) for tensor in tensors]}"
        if needs_gradient and tensor.requires_grad:
            return "it has no backward pass and a gradient is needed"
    if torch.is_autocast_enabled("cpu"):
        return "it does not follow autocast"
    return find_obstacle()
