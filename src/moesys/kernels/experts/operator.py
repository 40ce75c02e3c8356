"""The expert operator as operators of torch, ``moesys::experts`` and ``moesys::experts_summed``, for graphs that
``torch.compile`` captures.

The compiler sees one opaque node. The call is checked and its implementation chosen when the node runs, by the rules of
every other call, so compiled and eager results have the same bits. Experts that are the user's own modules cannot be
arguments of an operator, and how many rows each gets is known at run time only: there the graph breaks.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.library import custom_op

from moesys.kernels.choice import Kernel
from moesys.kernels.derivatives import is_transformed, refuse_derivatives
from moesys.kernels.experts import implementations
from moesys.kernels.experts.checks import check_call, check_sum
from moesys.kernels.flat_weight import flatten_weight, unflatten_weight
from moesys.kernels.records import Activation, Adapters, BankView, ExpertForm, ModuleView, Rows, TokenSum

_CALL = (
    "Tensor x, Tensor row_ids, Tensor offsets, Tensor gate_up, Tensor? gate_up_scales, SymInt gate_up_columns, "
    "Tensor down, Tensor? down_scales, SymInt down_columns, str product, Tensor? slots, "
    "str activation, float limit, float alpha, Tensor? gate_up_bias, Tensor? down_bias, "
    "Tensor[] adapters, float adapter_scale, str kernel"
)


def takes(view: BankView | ModuleView, rows: Rows, adapters: Adapters | None) -> TypeGuard[BankView]:
    """Whether a call can be a node: on a CPU, without derivatives, on a bank."""
    return (
        isinstance(view, BankView)
        and rows.x_RD.device.type == "cpu"
        and not is_transformed(*implementations.list_inputs(rows, view, adapters))
        and not implementations.needs_gradient(rows, view, adapters)
        and not torch.is_autocast_enabled("cpu")
    )


def call_experts(rows: Rows, view: BankView, adapters: Adapters | None, kernel: Kernel) -> Tensor:
    """Calls the operator; arguments as `moesys.kernels.experts.api.compute_experts`. Without gradients."""
    return torch.ops.moesys.experts.default(*flatten_call(rows, view, adapters, kernel))


def call_experts_summed(
    rows: Rows,
    view: BankView,
    weights_A: Tensor,
    token_sum: TokenSum,
    adapters: Adapters | None,
    kernel: Kernel,
) -> Tensor:
    """Calls the operator; arguments as `moesys.kernels.experts.api.compute_experts_summed`. Without gradients."""
    flat = flatten_call(rows, view, adapters, kernel)
    return torch.ops.moesys.experts_summed.default(weights_A, token_sum.positions, token_sum.offsets, *flat)


@custom_op("moesys::experts", mutates_args=(), schema=f"({_CALL}) -> Tensor")
def _experts(x: Tensor, *flat: Any) -> Tensor:
    rows, view, adapters, kernel = unflatten_call(x, *flat)
    check_call(rows, view, adapters)
    with torch.no_grad():
        return implementations.compute_experts(rows, view, adapters, kernel)


@_experts.register_fake
def _(x: Tensor, row_ids: Tensor, *flat: Any) -> Tensor:
    return x.new_empty(row_ids.shape[0], x.shape[1])


@custom_op(
    "moesys::experts_summed",
    mutates_args=(),
    schema=f"(Tensor weights, Tensor positions, Tensor sum_offsets, {_CALL}) -> Tensor",
)
def _experts_summed(weights: Tensor, positions: Tensor, sum_offsets: Tensor, *flat: Any) -> Tensor:
    rows, view, adapters, kernel = unflatten_call(*flat)
    token_sum = TokenSum(positions, sum_offsets)
    check_call(rows, view, adapters)
    check_sum(rows, view, weights, token_sum)
    with torch.no_grad():
        return implementations.compute_experts_summed(rows, view, weights, token_sum, adapters, kernel)


@_experts_summed.register_fake
def _(weights: Tensor, positions: Tensor, sum_offsets: Tensor, x: Tensor, *flat: Any) -> Tensor:
    return x.new_empty(sum_offsets.shape[0] - 1, x.shape[1])


refuse_derivatives(_experts)
refuse_derivatives(_experts_summed)


def flatten_call(rows: Rows, view: BankView, adapters: Adapters | None, kernel: Kernel) -> tuple[object, ...]:
    gate_up, gate_up_scales, gate_up_columns, product = flatten_weight(view.gate_up_SFD)
    down, down_scales, down_columns, _ = flatten_weight(view.down_SDF)
    matrices: list[Tensor] = []
    if adapters is not None:
        matrices = [
            adapters.gate_up_a_ERD,
            adapters.gate_up_b_EFR,
            adapters.down_a_ERF,
            adapters.down_b_EDR,
        ]
    return (
        rows.x_RD,
        rows.row_ids,
        rows.offsets,
        gate_up,
        gate_up_scales,
        gate_up_columns,
        down,
        down_scales,
        down_columns,
        product,
        view.slot_of_expert,
        view.form.activation.value,
        view.form.limit,
        view.form.alpha,
        view.gate_up_bias_SF,
        view.down_bias_SD,
        matrices,
        1.0 if adapters is None else adapters.scale,
        kernel.value,
    )


def unflatten_call(
    x: Tensor,
    row_ids: Tensor,
    offsets: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_columns: int,
    down: Tensor,
    down_scales: Tensor | None,
    down_columns: int,
    product: str,
    slots: Tensor | None,
    activation: str,
    limit: float,
    alpha: float,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    adapters: list[Tensor],
    adapter_scale: float,
    kernel: str,
) -> tuple[Rows, BankView, Adapters | None, Kernel]:
    view = BankView(
        unflatten_weight(gate_up, gate_up_scales, gate_up_columns, product),
        unflatten_weight(down, down_scales, down_columns, product),
        slots,
        ExpertForm(Activation(activation), limit, alpha),
        gate_up_bias,
        down_bias,
    )
    low_rank = Adapters(*adapters, scale=adapter_scale) if adapters else None
    return Rows(x, row_ids, offsets), view, low_rank, Kernel(kernel)
