"""The implementations of the expert operator and the choice among them, for arguments that are checked."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moesys.kernels.choice import FindObstacle, Kernel, Obstacle, choose_kernel, use_kernel
from moesys.kernels.derivatives import is_watched
from moesys.kernels.experts import native, reference, torch_loop
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

    def find_obstacle(
        self, rows: Rows, view: BankView | ModuleView, adapters: Adapters | None
    ) -> Obstacle | None:
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
    rows: Rows, view: BankView | ModuleView, adapters: Adapters | None, kernel: Kernel
) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts`."""
    implementation = _choose(rows, view, adapters, None, kernel)
    with use_kernel(kernel):
        return implementation.compute_experts(rows, view, adapters)


def fill_expert_rows(
    y_AD: Tensor,
    rows: Rows,
    view: BankView | ModuleView,
    adapters: Adapters | None,
    kernel: Kernel,
) -> None:
    """See `moesys.kernels.experts.api.fill_expert_rows`."""
    implementation = _choose(rows, view, adapters, None, kernel)
    with use_kernel(kernel):
        if implementation is native:
            native.fill_expert_rows(y_AD, rows, view)
            return
        view_y_AD = implementation.compute_experts(rows, view, adapters)
    if view.slot_of_expert is None:
        y_AD.copy_(view_y_AD)
    else:
        is_held = torch.repeat_interleave(view.slot_of_expert >= 0, rows.offsets.diff())
        y_AD[is_held] = view_y_AD[is_held].to(y_AD.dtype)


def compute_experts_summed(
    rows: Rows,
    view: BankView | ModuleView,
    weights_A: Tensor,
    token_sum: TokenSum,
    adapters: Adapters | None,
    kernel: Kernel,
) -> Tensor:
    """See `moesys.kernels.experts.api.compute_experts_summed`."""
    implementation = _choose(rows, view, adapters, weights_A, kernel)
    with use_kernel(kernel):
        return implementation.compute_experts_summed(rows, view, weights_A, token_sum, adapters)


def needs_gradient(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None) -> bool:
    """Whether autograd watches an input. The parameters of a `ModuleView` cannot be seen and count as watched."""
    if isinstance(view, ModuleView):
        return torch.is_grad_enabled()
    return any(is_watched(value) for value in list_inputs(rows, view, adapters))


def list_inputs(rows: Rows, view: BankView, adapters: Adapters | None) -> list[object]:
    """Returns what a result depends on smoothly; None for biases that are not there."""
    inputs: list[object] = [
        rows.x_RD,
        view.gate_up_SFD,
        view.down_SDF,
        view.gate_up_bias_SF,
        view.down_bias_SD,
    ]
    if adapters is not None:
        inputs += [adapters.gate_up_a_ERD, adapters.gate_up_b_EFR, adapters.down_a_ERF, adapters.down_b_EDR]
    return inputs


def _choose(
    rows: Rows,
    view: BankView | ModuleView,
    adapters: Adapters | None,
    weights_A: Tensor | None,
    kernel: Kernel,
) -> Implementation:
    needed = is_watched(weights_A) or needs_gradient(rows, view, adapters)

    def make_obstacle(implementation: Implementation) -> FindObstacle:
        def find_obstacle() -> Obstacle | None:
            if needed and not implementation.HAS_BACKWARD:
                return Obstacle("it computes no gradients; use it under torch.no_grad()")
            return implementation.find_obstacle(rows, view, adapters)

        return find_obstacle

    obstacles = {name: make_obstacle(implementation) for name, implementation in _IMPLEMENTATIONS.items()}
    return _IMPLEMENTATIONS[choose_kernel("experts", kernel, obstacles)]
