"""The specification of the expert operator: one assignment at a time, in plain differentiable torch.

Slow and obvious. Works in float64, which makes it the oracle for gradients too. Shares no arithmetic with the other
implementations, except the rule by which int8 values are rounded and unpacked.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moesys.kernels.linear.reference import multiply_vector
from moesys.kernels.records import (
    Activation,
    Adapters,
    BankView,
    ExpertForm,
    ModuleView,
    Rows,
    TokenSum,
)

ROW_INVARIANT = True
HAS_BACKWARD = True


def find_obstacle(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None) -> None:
    """See `moesys.kernels.experts.implementations.Implementation`. Computes every call."""


def compute_experts(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None = None) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts`."""
    slots, offsets = view.compute_slots(), rows.offsets.tolist()
    results = []
    for expert, slot in enumerate(slots):
        for a in range(offsets[expert], offsets[expert + 1]):
            # A copy, because the bits of a product depend on how its operands are aligned in memory.
            x_D = rows.x_RD[rows.row_ids[a]].clone()
            if slot < 0:
                results.append(torch.zeros_like(x_D))
            elif isinstance(view, ModuleView):
                results.append(view.functions[slot](x_D.unsqueeze(0)).squeeze(0).to(x_D.dtype))
            else:
                results.append(_compute_row(x_D, view, slot, adapters, expert))
    return torch.stack(results) if results else rows.x_RD.new_zeros(0, rows.x_RD.shape[1])


def compute_experts_summed(
    rows: Rows,
    view: BankView | ModuleView,
    weights_A: Tensor,
    token_sum: TokenSum,
    adapters: Adapters | None = None,
) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts_summed`."""
    y_AD = compute_experts(rows, view, adapters)
    weights_A = weights_A.to(y_AD.dtype)
    offsets = token_sum.offsets.tolist()
    results = []
    for start, end in pairwise(offsets):
        total_D = y_AD.new_zeros(y_AD.shape[1])
        for position in token_sum.positions[start:end].tolist():
            total_D = total_D + weights_A[position] * y_AD[position]
        results.append(total_D)
    return torch.stack(results) if results else y_AD.new_zeros(0, y_AD.shape[1])


def _compute_row(x_D: Tensor, view: BankView, slot: int, adapters: Adapters | None, expert: int) -> Tensor:
    hidden_H = multiply_vector(view.gate_up_SFD[slot], x_D)
    if view.gate_up_bias_SF is not None:
        hidden_H = hidden_H + view.gate_up_bias_SF[slot]
    if adapters is not None:
        low_rank_H = adapters.gate_up_b_EFR[expert] @ (adapters.gate_up_a_ERD[expert] @ x_D)
        hidden_H = hidden_H + adapters.scale * low_rank_H
    inner_F = _activate(hidden_H, view.form)
    y_D = multiply_vector(view.down_SDF[slot], inner_F)
    if view.down_bias_SD is not None:
        y_D = y_D + view.down_bias_SD[slot]
    if adapters is not None:
        y_D = y_D + adapters.scale * (adapters.down_b_EDR[expert] @ (adapters.down_a_ERF[expert] @ inner_F))
    return y_D


def _activate(hidden_H: Tensor, form: ExpertForm) -> Tensor:
    match form.activation:
        case Activation.SWIGLU:
            gate_F, up_F = hidden_H.chunk(2)
            return gate_F * torch.sigmoid(gate_F) * up_F
        case Activation.CLAMPED_SWIGLU:
            gate_F, up_F = hidden_H.chunk(2)
            gate_F, up_F = gate_F.clamp(max=form.limit), up_F.clamp(-form.limit, form.limit)
            return gate_F * torch.sigmoid(form.alpha * gate_F) * (up_F + 1)
        case Activation.GELU:
            return torch.nn.functional.gelu(hidden_H)
        case Activation.RELU:
            return torch.relu(hidden_H)
