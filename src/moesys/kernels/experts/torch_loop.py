"""The expert operator as a loop of matrix products over the experts that have rows, with its own backward.

What the loop buys over autograd through the same products: the weight gradients are written in place into one
buffer (indexing a stacked bank under autograd zero-fills a bank per expert), only the first products are kept
for the backward pass, and the pieces of one expert stay in the cache of the core while it is computed. The
backward pass makes no product for an input that needs no gradient, such as a frozen bank.

Float weights without adapters go this way, by the products of `moesys.kernels.products`. Int8 weights, adapters, the
user's own modules and other derivatives than a gradient are functions per expert under plain autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesys.kernels.choice import Kernel, read_wish, use_kernel
from moesys.kernels.derivatives import is_transformed
from moesys.kernels.experts.activations import activate, linearize
from moesys.kernels.experts.bank_functions import make_functions
from moesys.kernels.experts.modules import compute_functions, find_functions
from moesys.kernels.experts.padding import pad_groups
from moesys.kernels.experts.row_sum import add_rows, sum_rows, sum_rows_in_torch
from moesys.kernels.formats import Int8Weight
from moesys.kernels.products import multiply
from moesys.kernels.records import Adapters, BankView, ModuleView, Rows, TokenSum

ROW_INVARIANT = False
HAS_BACKWARD = True


def find_obstacle(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None) -> None:
    """See `moesys.kernels.experts.implementations.Implementation`. Computes every call."""


def compute_experts(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None = None) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts`."""
    if isinstance(view, ModuleView):
        return compute_functions(rows, find_functions(view))
    if not _recompiles_per_shape(rows.x_RD):
        return _compute(rows, view, adapters, None)
    padded = pad_groups(rows)
    return _compute(padded.rows, view, adapters, None)[padded.places]


def compute_experts_summed(
    rows: Rows,
    view: BankView | ModuleView,
    weights_A: Tensor,
    token_sum: TokenSum,
    adapters: Adapters | None = None,
) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts_summed`."""
    if isinstance(view, ModuleView):
        return sum_rows(compute_functions(rows, find_functions(view)), weights_A, token_sum)
    if not _recompiles_per_shape(rows.x_RD):
        return _compute(rows, view, adapters, _Sum(weights_A, token_sum))
    padded = pad_groups(rows)
    weighted = _Sum(padded.pad_weights(weights_A), padded.move_positions(token_sum))
    return _compute(padded.rows, view, adapters, weighted)


def _recompiles_per_shape(x_RD: Tensor) -> bool:
    return x_RD.device.type == "cpu" and x_RD.dtype in (torch.bfloat16, torch.float16)


class _Sum(NamedTuple):
    """The routing weights, and which of the weighted rows sum up to which row of the result."""

    weights_A: Tensor
    token_sum: TokenSum


def _compute(rows: Rows, view: BankView, adapters: Adapters | None, weighted: _Sum | None) -> Tensor:
    weights_A, token_sum = (None, None) if weighted is None else weighted
    is_plain = adapters is not None or isinstance(view.gate_up_SFD, Int8Weight)
    if is_plain or _is_transformed(rows, view, weights_A):
        y_AD = compute_functions(rows, make_functions(view, adapters))
        return y_AD if weighted is None else sum_rows(y_AD, *weighted)
    # Inside `forward` grad mode is always off, so whether anything will be kept is asked here.
    call = _Call(rows, view, token_sum, keeps=torch.is_grad_enabled(), wish=read_wish())
    biases = (view.gate_up_bias_SF, view.down_bias_SD)
    return _Experts.apply(rows.x_RD, view.gate_up_SFD, view.down_SDF, *biases, weights_A, call)  # pyrefly: ignore


def _is_transformed(rows: Rows, view: BankView, weights_A: Tensor | None) -> bool:
    banks = (view.gate_up_SFD, view.down_SDF, view.gate_up_bias_SF, view.down_bias_SD)
    return is_transformed(rows.x_RD, *banks, weights_A)


class _Call(NamedTuple):
    """What a call holds beside the tensors that autograd watches."""

    rows: Rows
    view: BankView
    token_sum: TokenSum | None
    keeps: bool
    wish: Kernel


class _Group(NamedTuple):
    """The assignments [start, end) of the expert whose weights lie in ``slot``."""

    slot: int
    start: int
    end: int


def _iterate_groups(rows: Rows, view: BankView) -> Iterator[_Group]:
    offsets = rows.offsets.tolist()
    for slot, start, end in zip(view.compute_slots(), offsets, offsets[1:], strict=False):
        if slot >= 0 and end > start:
            yield _Group(slot, start, end)


class _Experts(torch.autograd.Function):
    """Rows through their experts; with weights and a `TokenSum` also the weighted sum per token."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gate_up_SFD: Tensor,
        down_SDF: Tensor,
        gate_up_bias_SF: Tensor | None,
        down_bias_SD: Tensor | None,
        weights_A: Tensor | None,
        call: _Call,
    ) -> Tensor:
        rows, view = call.rows, call.view
        groups = list(_iterate_groups(rows, view))
        needs_backward = call.keeps and any(ctx.needs_input_grad)
        width = gate_up_SFD.shape[1]
        hidden_AH = x_RD.new_empty(rows.num_assignments if needs_backward else 0, width)
        y_AD = _new_rows(x_RD, rows, is_complete=view.covers_all)
        for slot, start, end in groups:
            x_ND = x_RD.index_select(0, rows.row_ids[start:end])
            hidden_NH = hidden_AH[start:end] if needs_backward else x_RD.new_empty(end - start, width)
            _multiply(x_ND, gate_up_SFD, gate_up_bias_SF, slot, out=hidden_NH)
            inner_NF = activate(hidden_NH, view.form)
            _multiply(inner_NF, down_SDF, down_bias_SD, slot, out=y_AD[start:end])
        if needs_backward:
            needs_weights = weights_A is not None and ctx.needs_input_grad[5]
            ctx.save_for_backward(
                x_RD, gate_up_SFD, down_SDF, gate_up_bias_SF, down_bias_SD, weights_A, hidden_AH,
                y_AD if needs_weights else None,
            )  # fmt: skip
            ctx.groups, ctx.rows, ctx.token_sum = groups, rows, call.token_sum
            ctx.form, ctx.is_complete, ctx.wish = view.form, view.covers_all, call.wish
        if weights_A is None or call.token_sum is None:
            return y_AD
        # Autograd will watch the result, as it watches the rows that the layer sums where there are several views.
        return (sum_rows_in_torch if needs_backward else sum_rows)(y_AD, weights_A, call.token_sum)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        with use_kernel(ctx.wish):
            return _compute_gradients(ctx, grad)


def _compute_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_RD, gate_up_SFD, down_SDF, gate_up_bias_SF, down_bias_SD, weights_A, hidden_AH, y_AD = ctx.saved_tensors
    rows: Rows = ctx.rows
    grad = grad.contiguous()
    result_ids = None if weights_A is None else ctx.token_sum.compute_result_ids(rows.num_assignments)
    weights_A1 = None if weights_A is None else weights_A.to(x_RD.dtype).unsqueeze(1)
    banks = (gate_up_SFD, down_SDF, gate_up_bias_SF, down_bias_SD)
    grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias = (
        _BankGradient(bank, ctx.groups) if needed else None
        for bank, needed in zip(banks, ctx.needs_input_grad[1:5], strict=True)
    )
    grad_x_AD = _new_rows(x_RD, rows, is_complete=ctx.is_complete) if ctx.needs_input_grad[0] else None
    needs_hidden = any(g is not None for g in (grad_x_AD, grad_gate_up, grad_gate_up_bias))
    grad_weights = None if y_AD is None else torch.zeros_like(weights_A)
    for slot, start, end in ctx.groups:
        if result_ids is None or weights_A1 is None:
            grad_y_ND = grad[start:end]
        else:
            grad_y_ND = grad.index_select(0, result_ids[start:end])
            if grad_weights is not None:
                products_ND = grad_y_ND * y_AD[start:end]
                grad_weights[start:end] = products_ND.sum(dim=1, dtype=weights_A.dtype)
            grad_y_ND.mul_(weights_A1[start:end])
        if grad_down_bias is not None:
            grad_down_bias.add_sum(slot, grad_y_ND)
        activation = linearize(hidden_AH[start:end], ctx.form)
        if grad_down is not None:
            grad_down.add_product(slot, grad_y_ND.t(), activation.compute_inner())
        if not needs_hidden:
            continue
        grad_inner_NF = multiply(grad_y_ND, down_SDF[slot].to(grad_y_ND.dtype))
        grad_hidden_NH = activation.compute_hidden_gradient(grad_inner_NF)
        if grad_gate_up_bias is not None:
            grad_gate_up_bias.add_sum(slot, grad_hidden_NH)
        if grad_gate_up is not None:
            x_ND = x_RD.index_select(0, rows.row_ids[start:end])
            grad_gate_up.add_product(slot, grad_hidden_NH.t(), x_ND)
        if grad_x_AD is not None:
            weight_HD = gate_up_SFD[slot].to(grad_hidden_NH.dtype)
            multiply(grad_hidden_NH, weight_HD, grad_x_AD[start:end])
    gradients = (grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias)
    return (
        None if grad_x_AD is None else add_rows(grad_x_AD, _invert(rows)),
        *(None if gradient is None else gradient.tensor for gradient in gradients),
        grad_weights,
        None,
    )


def _multiply(x_NK: Tensor, bank_SMK: Tensor, bias_SM: Tensor | None, slot: int, out: Tensor) -> None:
    weight_KM = bank_SMK[slot].to(x_NK.dtype).t()
    multiply(x_NK, weight_KM, out)
    if bias_SM is not None:
        out += bias_SM[slot]


class _BankGradient:
    """The gradient of a stacked bank: slots are written by their first term and added to by later ones."""

    def __init__(self, bank: Tensor, groups: list[_Group]) -> None:
        self.tensor = torch.empty_like(bank)
        self._written: set[int] = set()
        used = {group.slot for group in groups}
        for slot in range(bank.shape[0]):
            if slot not in used:
                self.tensor[slot].zero_()

    def add_product(self, slot: int, left: Tensor, right: Tensor) -> None:
        """Adds left @ right; a bank narrower than the rows takes the product rounded."""
        if left.dtype != self.tensor.dtype:
            self._add(slot, multiply(left, right))
        elif slot in self._written:
            multiply(left, right, self.tensor[slot], adds=True)
        else:
            multiply(left, right, self.tensor[slot])
            self._written.add(slot)

    def add_sum(self, slot: int, rows_NM: Tensor) -> None:
        """Adds the sum of the rows."""
        self._add(slot, rows_NM.sum(dim=0))

    def _add(self, slot: int, term: Tensor) -> None:
        if slot in self._written:
            self.tensor[slot].add_(term)
        else:
            self.tensor[slot].copy_(term)
            self._written.add(slot)


def _new_rows(x_RD: Tensor, rows: Rows, *, is_complete: bool) -> Tensor:
    """Returns an (assignments, hidden) buffer; zeros unless the groups will write every row."""
    shape = (rows.num_assignments, x_RD.shape[1])
    return x_RD.new_empty(shape) if is_complete else x_RD.new_zeros(shape)


def _invert(rows: Rows) -> TokenSum:
    """Returns which assignments each row of ``x_RD`` feeds, in the order of the experts."""
    counts = torch.bincount(rows.row_ids, minlength=rows.x_RD.shape[0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return TokenSum(positions=rows.row_ids.argsort(stable=True), offsets=offsets)
