"""The specification of the expert operator: one assignment at a time, in plain differentiable torch.

Slow and obvious. Works in float64, which makes it the oracle for gradients too.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moesys.kernels.experts.records import BankView, Rows, TokenSum


def compute_experts(rows: Rows, view: BankView) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts`."""
    slots, offsets = view.compute_slots(), rows.offsets.tolist()
    results = []
    for expert, slot in enumerate(slots):
        for a in range(offsets[expert], offsets[expert + 1]):
            x_D = rows.x_RD[rows.row_ids[a]]
            if slot < 0:
                results.append(torch.zeros_like(x_D))
                continue
            gate_F, up_F = (view.gate_up_SFD[slot] @ x_D).chunk(2)
            activation_F = torch.nn.functional.silu(gate_F) * up_F
            results.append(view.down_SDF[slot] @ activation_F)
    return torch.stack(results) if results else rows.x_RD.new_zeros(0, rows.x_RD.shape[1])


def compute_experts_summed(rows: Rows, view: BankView, weights_A: Tensor, token_sum: TokenSum) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts_summed`."""
    y_AD = compute_experts(rows, view)
    weights_A = weights_A.to(y_AD.dtype)
    offsets = token_sum.offsets.tolist()
    results = []
    for start, end in pairwise(offsets):
        total_D = y_AD.new_zeros(y_AD.shape[1])
        for position in token_sum.positions[start:end].tolist():
            total_D = total_D + weights_A[position] * y_AD[position]
        results.append(total_D)
    return torch.stack(results) if results else y_AD.new_zeros(0, y_AD.shape[1])
