"""The two entry points of the expert operator: check the arguments, choose an implementation, call it.

For an assignment a of row r to expert e::

    y_a = down_e @ (silu(gate_e @ x_r) * (up_e @ x_r))

and for a token with assignments a and routing weights w_a the result is the sum of w_a * y_a, in the order of its
choices.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.experts import reference, torch_loop
from moesys.kernels.experts.records import BankView, Rows, TokenSum


class Kernel(StrEnum):
    """Implementations of the expert operator; ``auto`` takes the fastest that fits."""

    AUTO = "auto"
    REFERENCE = "reference"
    TORCH = "torch"


_IMPLEMENTATIONS = {Kernel.AUTO: torch_loop, Kernel.REFERENCE: reference, Kernel.TORCH: torch_loop}


def compute_experts(rows: Rows, view: BankView, kernel: Kernel = Kernel.AUTO) -> Tensor:
    """Computes one row per assignment, without its routing weight; `sum_rows` applies that.

    Returns (assignments, hidden) in the dtype of ``rows.x_RD``; rows of experts that the view does not hold
    are zero. Raises `ShapeError`.
    """
    _check(rows, view)
    return _IMPLEMENTATIONS[kernel].compute_experts(rows, view)


def compute_experts_summed(
    rows: Rows, view: BankView, weights_A: Tensor, token_sum: TokenSum, kernel: Kernel = Kernel.AUTO
) -> Tensor:
    """Computes the rows and sums them, weighted, per token in the order of its choices.

    weights_A: (assignments,) float32 or float64, in the order of ``rows.row_ids``.
    The view must cover all experts, else the order of the sum would depend on the order in which views arrive.
    Returns (results, hidden) in the dtype of ``rows.x_RD``. Raises `ShapeError`.
    """
    _check(rows, view)
    _check_weights(rows, weights_A)
    if not view.covers_all:
        raise ShapeError(
            "summing in the kernel needs a view that covers every expert; "
            "use compute_experts per view and sum when the last one is done"
        )
    return _IMPLEMENTATIONS[kernel].compute_experts_summed(rows, view, weights_A, token_sum)


def _check(rows: Rows, view: BankView) -> None:
    hidden, num_slots = rows.x_RD.shape[-1], view.gate_up_SFD.shape[0]
    inner = view.down_SDF.shape[-1]
    if not rows.x_RD.is_floating_point():
        raise ShapeError(
            f"x must be floating point, got {rows.x_RD.dtype}; cast it to the dtype of the weights"
        )
    if view.gate_up_SFD.shape != (num_slots, 2 * inner, hidden):
        raise ShapeError(
            f"gate_up must be (slots, 2 * inner, hidden) = ({num_slots}, {2 * inner}, {hidden}), "
            f"got {tuple(view.gate_up_SFD.shape)}"
        )
    if view.down_SDF.shape != (num_slots, hidden, inner):
        raise ShapeError(
            f"down must be (slots, hidden, inner) = ({num_slots}, {hidden}, {inner}), got {tuple(view.down_SDF.shape)}"
        )
    if view.covers_all and num_slots != rows.num_experts:
        raise ShapeError(
            f"a view without a slot table must hold all {rows.num_experts} experts, it has {num_slots} slots"
        )
    if view.slot_of_expert is not None and view.slot_of_expert.shape != (rows.num_experts,):
        raise ShapeError(
            f"slot_of_expert must have one entry per expert ({rows.num_experts}), "
            f"got shape {tuple(view.slot_of_expert.shape)}"
        )
    if view.gate_up_SFD.dtype != rows.x_RD.dtype or view.down_SDF.dtype != rows.x_RD.dtype:
        raise ShapeError(
            f"x is {rows.x_RD.dtype} but the experts are {view.gate_up_SFD.dtype} and {view.down_SDF.dtype}; "
            "cast x to the dtype of the weights"
        )


def _check_weights(rows: Rows, weights_A: Tensor) -> None:
    if weights_A.shape != rows.row_ids.shape:
        raise ShapeError(
            f"weights must have one entry per assignment ({rows.num_assignments}), got shape {tuple(weights_A.shape)}"
        )
    if torch.is_grad_enabled() and weights_A.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"routing weights must be float32 or float64, got {weights_A.dtype}; route in float32"
        )
