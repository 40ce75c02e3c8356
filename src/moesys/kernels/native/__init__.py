"""CPU kernels in C, built on first use with the system's compiler. Optional: without one, torch computes."""

from moesys.kernels.native.library import (
    WeightFormat,
    compute_experts,
    compute_linear,
    find_call_obstacle,
    find_format,
    find_obstacle,
    read_memory,
)

__all__ = [
    "WeightFormat",
    "compute_experts",
    "compute_linear",
    "find_call_obstacle",
    "find_format",
    "find_obstacle",
    "read_memory",
]
