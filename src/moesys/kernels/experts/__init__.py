"""The expert operator: rows of tokens through the experts of a bank view."""

from moesys.kernels.experts.api import (
    compute_experts,
    compute_experts_summed,
    fill_expert_rows,
    new_expert_rows,
)
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
    "fill_expert_rows",
    "new_expert_rows",
    "sum_rows",
]
