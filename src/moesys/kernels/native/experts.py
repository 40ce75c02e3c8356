"""Rows through their experts in C, as rows per assignment or summed per token."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.native.library import load_library
from moesys.kernels.native.operands import (
    FLOAT32,
    ActivationBuffers,
    new_inner_rows,
    pack_matrix,
    point,
    require_readable,
)
from moesys.kernels.native.row_sum import SumBuffers
from moesys.kernels.native.structures import ExpertsCall
from moesys.kernels.records import Activation, BankView, Rows, TokenSum

_ACTIVATIONS = (Activation.SWIGLU, Activation.CLAMPED_SWIGLU, Activation.GELU, Activation.RELU)
"""In the order of ``activation`` in experts.c."""


def compute_experts(rows: Rows, view: BankView) -> Tensor:
    """Computes float32 rows per assignment for float32 or bfloat16 ``rows.x_RD``. Rows of experts that the view does
    not hold are zero. Raises `ShapeError` for indices that are not int64 on a CPU or out of range."""
    new_rows = torch.empty if view.covers_all else torch.zeros
    y_AD = new_rows(rows.num_assignments, rows.x_RD.shape[1], **FLOAT32)
    _compute(rows, view, None, y_AD)
    return y_AD


def fill_expert_rows(y_AD: Tensor, rows: Rows, view: BankView) -> None:
    """Writes the rows of `compute_experts` into a contiguous float32 (assignments, hidden) tensor; those of experts
    that the view does not hold stay as they are. Raises as `compute_experts`."""
    _compute(rows, view, None, y_AD)


def compute_experts_summed(rows: Rows, view: BankView, weights_A: Tensor, token_sum: TokenSum) -> Tensor:
    """Computes the rows and sums them per token, for a view that covers every expert. Returns (results, hidden) in the
    dtype of ``rows.x_RD``: the bits of `sum_rows` over `compute_experts` in that dtype. Raises as `compute_experts`."""
    sums = SumBuffers(weights_A, token_sum, rows.x_RD.shape[1], rows.x_RD.dtype)
    _compute(rows, view, sums, torch.empty(rows.num_assignments, rows.x_RD.shape[1], **FLOAT32))
    return sums.results_RD


def _compute(rows: Rows, view: BankView, sums: SumBuffers | None, y_AD: Tensor) -> None:
    require_readable(torch.int64, rows.row_ids, rows.offsets, view.slot_of_expert)
    num_assignments = rows.num_assignments
    inner = view.gate_up_SFD.shape[1] // view.form.num_halves
    x = ActivationBuffers(rows.x_RD, view.gate_up_SFD)
    inner_RF = new_inner_rows(num_assignments, inner, rows.x_RD.dtype, view.down_SDF)
    inner_rows = ActivationBuffers(inner_RF, view.down_SDF)
    row_ids, offsets = rows.row_ids.contiguous(), rows.offsets.contiguous()
    slots = None if view.slot_of_expert is None else view.slot_of_expert.contiguous()
    gate_up_bias, down_bias = _widen(view.gate_up_bias_SF), _widen(view.down_bias_SD)
    call = ExpertsCall(
        x=x.record,
        row_ids=row_ids.data_ptr(),
        offsets=offsets.data_ptr(),
        slots=point(slots),
        num_experts=rows.num_experts,
        num_rows=rows.x_RD.shape[0],
        num_assignments=num_assignments,
        num_slots=view.num_slots,
        gate_up=pack_matrix(view.gate_up_SFD),
        down=pack_matrix(view.down_SDF),
        gate_up_bias=point(gate_up_bias),
        down_bias=point(down_bias),
        activation=_ACTIVATIONS.index(view.form.activation),
        limit=view.form.limit,
        alpha=view.form.alpha,
        inner=inner,
        inner_rows=inner_rows.record,
        y=y_AD.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if sums is not None:
        call.sums = sums.record
    status = load_library().moesys_experts(ctypes.byref(call))
    if status == 1:
        raise MemoryError("the native expert kernel found no memory for its list of experts")
    if status == 2:
        raise ShapeError(
            f"row_ids must be in 0..{rows.x_RD.shape[0] - 1}, slots in -1..{view.num_slots - 1}, and offsets must rise "
            f"from 0 to the number of assignments ({num_assignments}); positions of a sum must be in "
            f"0..{num_assignments - 1} and its offsets rise to their number; one of them does not"
        )


def _widen(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
