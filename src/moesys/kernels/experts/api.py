"""The two entry points of the expert operator: check the arguments, choose an implementation, call it.

For an assignment a of row r to expert e, with the form's activation between the products::

    y_a = down_e @ activation(gate_up_e @ x_r + gate_up_bias_e) + down_bias_e

and for a token with assignments a and routing weights w_a the result is the sum of w_a * y_a, in the order of its
choices. Adapters add a low-rank matrix to both matrices of each expert.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moesys.kernels.choice import Kernel, Obstacle, choose_kernel
from moesys.kernels.experts import native, reference, torch_loop
from moesys.kernels.experts.checks import check_call, check_sum
from moesys.kernels.records import Adapters, BankView, ModuleView, Rows, TokenSum


class Implementation(Protocol):
    """What a module must hold to be an implementation of the operator."""

    @property
    def ROW_INVARIANT(self) -> bool:
        """Whether the bits of a row depend on nothing but that row: not on how many rows or threads there are."""
        ...

    @property
    def HAS_BACKWARD(self) -> bool:
        """Whether gradients flow through the result."""
        ...

    def find_obstacle(self, rows: Rows, view: BankView | ModuleView, adapters: Adapters | None) -> str | None:
        """Returns why a checked call cannot be computed here, or None."""
        ...

    def compute_experts(
        self, rows: Rows, view: BankView | ModuleView, adapters: Adapters | None = None
    ) -> Tensor: ...

    def compute_experts_summed(
        self,
        rows: Rows,
        view: BankView | ModuleView,
        weights_A: Tensor,
        token_sum: TokenSum,
        adapters: Adapters | None = None,
    ) -> Tensor: ...


_IMPLEMENTATIONS: dict[Kernel, Implementation] = {
    Kernel.NATIVE: native,
    Kernel.TORCH: torch_loop,
    Kernel.REFERENCE: reference,
}
"""Fastest first."""


def compute_experts(
    rows: Rows,
    view: BankView | ModuleView,
    adapters: Adapters | None = None,
    kernel: Kernel = Kernel.AUTO,
) -> Tensor:
    """Computes one row per assignment, without its routing weight; `sum_rows` applies that.

    Float weights may be narrower than the rows and are widened; int8 weights take float32 rows and get no gradient.
    Returns (assignments, hidden) in the dtype of ``rows.x_RD``; rows of experts that the view does not hold
    are zero. Raises `ShapeError`, and `KernelError` for a kernel that cannot take the call.
    """
    check_call(rows, view, adapters)
    needs_gradient = _needs_gradient(rows, view, adapters)
    implementation = _choose(rows, view, adapters, kernel, needs_gradient=needs_gradient)
    return implementation.compute_experts(rows, view, adapters)


def compute_experts_summed(
    rows: Rows,
    view: BankView | ModuleView,
    weights_A: Tensor,
    token_sum: TokenSum,
    adapters: Adapters | None = None,
    kernel: Kernel = Kernel.AUTO,
) -> Tensor:
    """Computes the rows and sums them, weighted, per token in the order of its choices.

    weights_A: (assignments,) float32 or float64, in the order of ``rows.row_ids``.
    The view must cover all experts, else the order of the sum would depend on the order in which views arrive.
    Returns (results, hidden) in the dtype of ``rows.x_RD``. Raises as `compute_experts` does.
    """
    check_call(rows, view, adapters)
    check_sum(rows, view, weights_A, token_sum)
    needs_gradient = _is_watched(weights_A) or _needs_gradient(rows, view, adapters)
    implementation = _choose(rows, view, adapters, kernel, needs_gradient=needs_gradient)
    return implementation.compute_experts_summed(rows, view, weights_A, token_sum, adapters)


def _choose(
    rows: Rows,
    view: BankView | ModuleView,
    adapters: Adapters | None,
    kernel: Kernel,
    *,
    needs_gradient: bool,
) -> Implementation:
    def make_obstacle(implementation: Implementation) -> Obstacle:
        def find_obstacle() -> str | None:
            if needs_gradient and not implementation.HAS_BACKWARD:
                return "it computes no gradients; use it under torch.no_grad()"
            return implementation.find_obstacle(rows, view, adapters)

        return find_obstacle

    obstacles = {name: make_obstacle(implementation) for name, implementation in _IMPLEMENTATIONS.items()}
    return _IMPLEMENTATIONS[choose_kernel("experts", kernel, obstacles)]


def _needs_gradient(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None) -> bool:
    """Whether autograd watches an input. The parameters of a `ModuleView` cannot be seen and count as watched."""
    if isinstance(view, ModuleView):
        return torch.is_grad_enabled()
    inputs: list[object] = [
        rows.x_RD,
        view.gate_up_SFD,
        view.down_SDF,
        view.gate_up_bias_SF,
        view.down_bias_SD,
    ]
    if adapters is not None:
        inputs += [adapters.gate_up_a_ERD, adapters.gate_up_b_EFR, adapters.down_a_ERF, adapters.down_b_EDR]
    return any(_is_watched(tensor) for tensor in inputs)


def _is_watched(value: object) -> bool:
    return torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad
