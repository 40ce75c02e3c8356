"""The expert operator as a loop of matrix products over the experts that have rows, with its own backward.

What the loop buys over autograd through the same products: the weight gradients are written in place into one
buffer (indexing a stacked bank under autograd zero-fills a bank per expert), only the gate-up products are kept
for the backward pass, and the pieces of one expert stay in the cache of the core while it is computed. The
backward pass makes no product for an input that needs no gradient, such as a frozen bank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesys.kernels.experts.padding import pad_groups
from moesys.kernels.experts.records import BankView, Rows, TokenSum
from moesys.kernels.experts.row_sum import add_rows, sum_rows


def compute_experts(rows: Rows, view: BankView) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts`."""
    if not _recompiles_per_shape(rows.x_RD):
        return _apply(rows, view, None, None)
    padded = pad_groups(rows)
    return _apply(padded.rows, view, None, None)[padded.places]


def compute_experts_summed(rows: Rows, view: BankView, weights_A: Tensor, token_sum: TokenSum) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts_summed`."""
    if not _recompiles_per_shape(rows.x_RD):
        return _apply(rows, view, weights_A, token_sum)
    padded = pad_groups(rows)
    return _apply(padded.rows, view, padded.pad_weights(weights_A), padded.move_positions(token_sum))


def _recompiles_per_shape(x_RD: Tensor) -> bool:
    return x_RD.device.type == "cpu" and x_RD.dtype in (torch.bfloat16, torch.float16)


def _apply(rows: Rows, view: BankView, weights_A: Tensor | None, token_sum: TokenSum | None) -> Tensor:
    # Inside `forward` grad mode is always off, so whether anything will be kept is asked here.
    keeps = torch.is_grad_enabled()
    return _Experts.apply(rows.x_RD, view.gate_up_SFD, view.down_SDF, weights_A, rows, view, token_sum, keeps)  # pyrefly: ignore


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
        weights_A: Tensor | None,
        rows: Rows,
        view: BankView,
        token_sum: TokenSum | None,
        keeps: bool,
    ) -> Tensor:
        groups = list(_iterate_groups(rows, view))
        needs_backward = keeps and any(ctx.needs_input_grad)
        hidden_AF = x_RD.new_empty(rows.num_assignments if needs_backward else 0, gate_up_SFD.shape[1])
        y_AD = _new_rows(x_RD, rows, is_complete=view.covers_all)
        for slot, start, end in groups:
            x_ND = x_RD.index_select(0, rows.row_ids[start:end])
            hidden_NF = (
                hidden_AF[start:end] if needs_backward else x_RD.new_empty(end - start, gate_up_SFD.shape[1])
            )
            torch.mm(x_ND, gate_up_SFD[slot].t(), out=hidden_NF)
            gate_NF, up_NF = hidden_NF.chunk(2, dim=1)
            activation_NF = torch.nn.functional.silu(gate_NF).mul_(up_NF)
            torch.mm(activation_NF, down_SDF[slot].t(), out=y_AD[start:end])
        if needs_backward:
            needs_weights = weights_A is not None and ctx.needs_input_grad[3]
            ctx.save_for_backward(
                x_RD, gate_up_SFD, down_SDF, weights_A, hidden_AF, y_AD if needs_weights else None
            )
            ctx.groups, ctx.rows, ctx.token_sum, ctx.is_complete = groups, rows, token_sum, view.covers_all
        return y_AD if weights_A is None or token_sum is None else sum_rows(y_AD, weights_A, token_sum)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        x_RD, gate_up_SFD, down_SDF, weights_A, hidden_AF, y_AD = ctx.saved_tensors
        rows: Rows = ctx.rows
        grad = grad.contiguous()
        result_ids = None if weights_A is None else ctx.token_sum.compute_result_ids(rows.num_assignments)
        weights_A1 = None if weights_A is None else weights_A.to(x_RD.dtype).unsqueeze(1)
        needs_x, needs_gate_up, needs_down = ctx.needs_input_grad[:3]
        grad_gate_up = _BankGradient(gate_up_SFD, ctx.groups) if needs_gate_up else None
        grad_down = _BankGradient(down_SDF, ctx.groups) if needs_down else None
        grad_x_AD = _new_rows(x_RD, rows, is_complete=ctx.is_complete) if needs_x else None
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
            gate_NF, up_NF = hidden_AF[start:end].chunk(2, dim=1)
            silu_NF = torch.nn.functional.silu(gate_NF)
            if grad_down is not None:
                grad_down.add_product(slot, grad_y_ND.t(), silu_NF * up_NF)
            if grad_x_AD is None and grad_gate_up is None:
                continue
            grad_act_NF = grad_y_ND @ down_SDF[slot]
            grad_hidden_NF = torch.empty_like(hidden_AF[start:end])
            grad_gate_NF, grad_up_NF = grad_hidden_NF.chunk(2, dim=1)
            torch.mul(grad_act_NF, silu_NF, out=grad_up_NF)
            torch.ops.aten.silu_backward.grad_input(grad_act_NF.mul_(up_NF), gate_NF, grad_input=grad_gate_NF)
            if grad_gate_up is not None:
                x_ND = x_RD.index_select(0, rows.row_ids[start:end])
                grad_gate_up.add_product(slot, grad_hidden_NF.t(), x_ND)
            if grad_x_AD is not None:
                torch.mm(grad_hidden_NF, gate_up_SFD[slot], out=grad_x_AD[start:end])
        return (
            None if grad_x_AD is None else add_rows(grad_x_AD, _invert(rows)),
            None if grad_gate_up is None else grad_gate_up.tensor,
            None if grad_down is None else grad_down.tensor,
            grad_weights,
            *(None,) * 4,
        )


class _BankGradient:
    """The gradient of a stacked bank: slots are written by their first product and added to by later ones."""

    def __init__(self, bank: Tensor, groups: list[_Group]) -> None:
        self.tensor = torch.empty_like(bank)
        self._written: set[int] = set()
        used = {group.slot for group in groups}
        for slot in range(bank.shape[0]):
            if slot not in used:
                self.tensor[slot].zero_()

    def add_product(self, slot: int, left: Tensor, right: Tensor) -> None:
        if slot in self._written:
            self.tensor[slot].addmm_(left, right)
        else:
            torch.mm(left, right, out=self.tensor[slot])
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
