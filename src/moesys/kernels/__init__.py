"""Pure functions from tensors to tensors. They know nothing of models, files or ranks.

One folder per operator: ``api`` validates and chooses, ``reference`` is the specification in plain torch, and
every other file is one implementation. Tensor names end in shape letters: A assignments, D hidden, E experts,
F inner width of an expert, K choices, R rows, S slots or sequence, T tokens, V vocabulary.
"""

from moesys.kernels.choice import Kernel, use_kernel
from moesys.kernels.cross_entropy import linear_cross_entropy
from moesys.kernels.experts import (
    Activation,
    Adapters,
    BankView,
    ExpertForm,
    ModuleView,
    Rows,
    TokenSum,
    compute_experts,
    compute_experts_summed,
    fill_expert_rows,
    new_expert_rows,
    sum_rows,
)
from moesys.kernels.formats import Int8Product, Int8Weight, pack_int8
from moesys.kernels.grouped_linear import grouped_linear
from moesys.kernels.linear import linear
from moesys.kernels.products import multiply
from moesys.kernels.rms_norm import rms_norm
from moesys.kernels.rotary import rotate_pairs

__all__ = [
    "Activation",
    "Adapters",
    "BankView",
    "ExpertForm",
    "Int8Product",
    "Int8Weight",
    "Kernel",
    "ModuleView",
    "Rows",
    "TokenSum",
    "compute_experts",
    "compute_experts_summed",
    "fill_expert_rows",
    "grouped_linear",
    "linear",
    "linear_cross_entropy",
    "multiply",
    "new_expert_rows",
    "pack_int8",
    "rms_norm",
    "rotate_pairs",
    "sum_rows",
    "use_kernel",
]
