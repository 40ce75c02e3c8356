"""CPU kernels in C, built on first use with the system's compiler. Optional: without one, torch computes."""

from moesys.kernels.native.attention import attend_pages
from moesys.kernels.native.cpu_level import is_half_used_by_mkl
from moesys.kernels.native.experts import (
    compute_experts,
    compute_experts_summed,
    fill_expert_rows,
)
from moesys.kernels.native.grouped_linear import compute_grouped_linear, fits_grouped_linear
from moesys.kernels.native.library import find_call_obstacle, find_obstacle
from moesys.kernels.native.products import compute_linear, compute_product, fits_product, read_memory
from moesys.kernels.native.rms_norm import compute_rms_norm, compute_rms_norm_pair
from moesys.kernels.native.rotary import rotate_pairs
from moesys.kernels.native.routing import choose_and_weigh, choose_top_k, group_by_expert, weigh_choice
from moesys.kernels.native.row_sum import sum_rows
from moesys.kernels.native.weight_format import WeightFormat, find_format

__all__ = [
    "WeightFormat",
    "attend_pages",
    "choose_and_weigh",
    "choose_top_k",
    "compute_experts",
    "compute_experts_summed",
    "compute_grouped_linear",
    "compute_linear",
    "compute_product",
    "compute_rms_norm",
    "compute_rms_norm_pair",
    "fill_expert_rows",
    "find_call_obstacle",
    "find_format",
    "find_obstacle",
    "fits_grouped_linear",
    "fits_product",
    "group_by_expert",
    "is_half_used_by_mkl",
    "read_memory",
    "rotate_pairs",
    "sum_rows",
    "weigh_choice",
]
