"""The expert operator on a CPU in C: every weight is read from memory once, sums are float32.

A row's bits never depend on how many rows or threads there are. Inference's default; it has no backward pass.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moesys.kernels import native
from moesys.kernels.experts.records import Adapters, BankView, ModuleView, Rows, TokenSum

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
    return _compute(rows, view, None)


def compute_experts_summed(
    rows: Rows,
    view: BankView | ModuleView,
    weights_A: Tensor,
    token_sum: TokenSum,
    adapters: Adapters | None = None,
) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts_summed`."""
    return _compute(rows, view, native.WeightedSum(weights_A.float(), token_sum))


def _compute(rows: Rows, view: BankView | ModuleView, weighted: native.WeightedSum | None) -> Tensor:
    assert isinstance(view, BankView)
    x_RD = rows.x_RD.float()
    biases = {
        name: None if bias is None else bias.float()
        for name, bias in (("gate_up_bias_SF", view.gate_up_bias_SF), ("down_bias_SD", view.down_bias_SD))
    }
    result = native.compute_experts(replace(rows, x_RD=x_RD), replace(view, **biases), weighted)
    return result.to(rows.x_RD.dtype)
