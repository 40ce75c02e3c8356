"""CPU kernels in C, built on first use with the system's compiler. Optional: without one, torch computes."""

from moesys.kernels.native.cpu_level import is_half_used_by_mkl
from moesys.kernels.native.library import (
    WeightFormat,
    compute_experts,
    compute_linear,
    compute_product,
    find_call_obstacle,
    find_format,
    find_obstacle,
    fits_product,
    read_memory,
)

__all__ = [
    "WeightFormat",
    "compute_experts",
    "compute_linear",
    "compute_product",
    "find_call_obstacle",
    "find_format",
    "find_obstacle",
    "fits_product",
    "is_half_used_by_mkl",
    "read_memory",
]
