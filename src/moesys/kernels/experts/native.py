"""The expert operator on a CPU in C: every weight is read from memory once, sums are float32.

A row's bits never depend on how many rows or threads there are. Inference's default; it has no backward pass.
"""

from __future__ import annotations

from torch import Tensor

from moesys.kernels import native
from moesys.kernels.choice import Obstacle
from moesys.kernels.derivatives import is_transformed
from moesys.kernels.experts.row_sum import sum_rows_in_torch
from moesys.kernels.fork import require_threads
from moesys.kernels.native_calls import find_native_obstacle
from moesys.kernels.records import Adapters, BankView, ModuleView, Rows, TokenSum

ROW_INVARIANT = True
HAS_BACKWARD = False


def find_obstacle(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None) -> Obstacle | None:
    """Returns why the native kernel cannot take a checked call, or None."""
    if isinstance(view, ModuleView):
        return Obstacle("it computes banks of weights, and these experts are modules")
    indices = (rows.row_ids, rows.offsets, view.slot_of_expert)
    others = (view.gate_up_bias_SF, view.down_bias_SD, *indices)
    obstacle = find_native_obstacle(rows.x_RD, [view.gate_up_SFD, view.down_SDF], others)
    if obstacle is None and adapters is not None:
        return Obstacle("it computes no adapters", "add them to the weights (scale * b @ a)")
    return obstacle


def compute_experts(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None = None) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts`."""
    assert isinstance(view, BankView)
    require_threads()
    return native.compute_experts(rows, view).to(rows.x_RD.dtype)


def fill_expert_rows(y_AD: Tensor, rows: Rows, view: BankView | ModuleView) -> None:
    """See `moesys.kernels.experts.api.fill_expert_rows`."""
    assert isinstance(view, BankView)
    require_threads()
    native.fill_expert_rows(y_AD, rows, view)


def compute_experts_summed(
    rows: Rows,
    view: BankView | ModuleView,
    weights_A: Tensor,
    token_sum: TokenSum,
    adapters: Adapters | None = None,
) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts_summed`."""
    assert isinstance(view, BankView)
    if is_transformed(weights_A):
        return sum_rows_in_torch(compute_experts(rows, view), weights_A, token_sum)
    require_threads()
    return native.compute_experts_summed(rows, view, weights_A, token_sum)
