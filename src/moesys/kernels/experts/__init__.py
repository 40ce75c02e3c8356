"""The expert operator: rows of tokens through the experts of a bank view."""

from moesys.kernels.experts.api import compute_experts, compute_experts_summed
from moesys.kernels.experts.row_sum import sum_rows
from moesys.kernels.records import (
    Activation,
    Adapters,
    BankView,
    ExpertForm,
    ModuleView,
    Rows,
    TokenSum,
    Weight,
)

__all__ = [
    "Activation",
    "Adapters",
    "BankView",
    "ExpertForm",
    "ModuleView",
    "Rows",
    "TokenSum",
    "Weight",
    "compute_experts",
    "compute_experts_summed",
    "sum_rows",
]
