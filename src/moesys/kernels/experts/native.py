"""The expert operator on a CPU in C: every weight is read from memory once, sums are float32.

A row's bits never depend on how many rows or threads there are. Inference's default; it has no backward pass.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moesys.kernels import native
from moesys.kernels.experts.row_sum import sum_rows
from moesys.kernels.records import Adapters, BankView, ModuleView, Rows, TokenSum

ROW_INVARIANT = True
HAS_BACKWARD = False


def find_obstacle(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None) -> str | None:
    """Returns why the native kernel cannot take a checked call, or None."""
    if adapters is not None:
        return "it computes no adapters"
    if isinstance(view, ModuleView):
        return "it computes banks of weights, and these experts are modules"
    return native.find_call_obstacle(
        rows.x_RD, [view.gate_up_SFD, view.down_SDF], [view.gate_up_bias_SF, view.down_bias_SD]
    )


def compute_experts(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None = None) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts`."""
    assert isinstance(view, BankView)
    widened = replace(
        view, gate_up_bias_SF=_widen(view.gate_up_bias_SF), down_bias_SD=_widen(view.down_bias_SD)
    )
    y_AD = native.compute_experts(rows, widened)
    return y_AD.to(rows.x_RD.dtype)


def compute_experts_summed(
    rows: Rows,
    view: BankView | ModuleView,
    weights_A: Tensor,
    token_sum: TokenSum,
    adapters: Adapters | None = None,
) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts_summed`."""
    return sum_rows(compute_experts(rows, view, adapters), weights_A, token_sum)


def _widen(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
