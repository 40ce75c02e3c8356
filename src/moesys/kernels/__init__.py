"""Pure functions from tensors to tensors. They know nothing of models, files or ranks.

One folder per operator: ``api`` validates and chooses, ``reference`` is the specification in plain torch, and
every other file is one implementation. Tensor names end in shape letters: A assignments, D hidden, E experts,
F inner width of an expert, K choices, R rows, S slots or sequence, T tokens, V vocabulary.
"""

from moesys.kernels.cross_entropy import linear_cross_entropy
from moesys.kernels.experts import (
    BankView,
    Kernel,
    Rows,
    TokenSum,
    compute_experts,
    compute_experts_summed,
    sum_rows,
)
from moesys.kernels.rms_norm import rms_norm
from moesys.kernels.rotary import rotate_pairs

__all__ = [
    "BankView",
    "Kernel",
    "Rows",
    "TokenSum",
    "compute_experts",
    "compute_experts_summed",
    "linear_cross_entropy",
    "rms_norm",
    "rotate_pairs",
    "sum_rows",
]
