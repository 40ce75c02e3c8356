"""The expert operator: rows of tokens through the SwiGLU experts of a bank view."""

from moesys.kernels.experts.api import Kernel, compute_experts, compute_experts_summed
from moesys.kernels.experts.records import BankView, Rows, TokenSum
from moesys.kernels.experts.row_sum import sum_rows

__all__ = ["BankView", "Kernel", "Rows", "TokenSum", "compute_experts", "compute_experts_summed", "sum_rows"]
