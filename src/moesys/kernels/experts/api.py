"""The two entry points of the expert operator: check the arguments, then compute or, in a compiler, put down a node.

For an assignment a of row r to expert e, with the form's activation between the products::

    y_a = down_e @ activation(gate_up_e @ x_r + gate_up_bias_e) + down_bias_e

and for a token with assignments a and routing weights w_a the result is the sum of w_a * y_a, in the order of its
choices. Adapters add a low-rank matrix to both matrices of each expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels.choice import Kernel
from moesys.kernels.derivatives import is_watched
from moesys.kernels.experts import implementations, operator
from moesys.kernels.experts.checks import check_call, check_sum
from moesys.kernels.records import Adapters, BankView, ModuleView, Rows, TokenSum


def compute_experts(
    rows: Rows,
    view: BankView | ModuleView,
    adapters: Adapters | None = None,
    kernel: Kernel = Kernel.AUTO,
) -> Tensor:
    """Computes one row per assignment, without its routing weight; `sum_rows` applies that.

    Float weights may be narrower than the rows and are widened; int8 weights take float32 rows and get no gradient.
    Returns (assignments, hidden) in the dtype of ``rows.x_RD``; rows of experts that the view does not hold
    are zero. Raises `ShapeError`, and `KernelError` for a kernel that cannot take the call.
    """
    if torch.compiler.is_compiling() and operator.takes(view, rows, adapters):
        return operator.call_experts(rows, view, adapters, kernel)
    check_call(rows, view, adapters)
    return implementations.compute_experts(rows, view, adapters, kernel)


def new_expert_rows(rows: Rows) -> Tensor:
    """Returns (assignments, hidden) for `fill_expert_rows`, contents undefined: float32, or float64 for such rows."""
    dtype = torch.float64 if rows.x_RD.dtype == torch.float64 else torch.float32
    return rows.x_RD.new_empty(rows.num_assignments, rows.x_RD.shape[1], dtype=dtype)


def fill_expert_rows(
    y_AD: Tensor,
    rows: Rows,
    view: BankView | ModuleView,
    adapters: Adapters | None = None,
    kernel: Kernel = Kernel.AUTO,
) -> None:
    """Writes what `compute_experts` returns for the experts that the view holds and leaves the other rows as they are,
    so that many views cost no more than one. Without gradients only.

    y_AD: made by `new_expert_rows`. In the dtype of ``rows.x_RD`` its rows have the bits of `compute_experts`.
    """
    check_call(rows, view, adapters)
    implementations.fill_expert_rows(y_AD, rows, view, adapters, kernel)


def compute_experts_summed(
    rows: Rows,
    view: BankView | ModuleView,
    weights_A: Tensor,
    token_sum: TokenSum,
    adapters: Adapters | None = None,
    kernel: Kernel = Kernel.AUTO,
) -> Tensor:
    """Computes the rows and sums them, weighted, per token in the order of its choices.

    weights_A: (assignments,) float32 or float64, in the order of ``rows.row_ids``.
    The view must cover all experts, else the order of the sum would depend on the order in which views arrive.
    Returns (results, hidden) in the dtype of ``rows.x_RD``. Raises as `compute_experts` does.
    """
    if torch.compiler.is_compiling() and operator.takes(view, rows, adapters) and not is_watched(weights_A):
        return operator.call_experts_summed(rows, view, weights_A, token_sum, adapters, kernel)
    check_call(rows, view, adapters)
    check_sum(rows, view, weights_A, token_sum)
    return implementations.compute_experts_summed(rows, view, weights_A, token_sum, adapters, kernel)
