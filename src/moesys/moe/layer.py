"""The MoE layer: a router, a dispatcher and an expert source, siblings that can each be swapped alone.

The layer knows nothing of ranks, tiers or files. It routes, lets the dispatcher bring rows, computes bank views
as they arrive, and lets the dispatcher take the results home.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesys.errors import ShapeError
from moesys.kernels import compute_experts, compute_experts_summed, sum_rows
from moesys.moe.dispatch import LocalDispatcher, Part
from moesys.moe.execution import Execution
from moesys.moe.router import TopKRouter
from moesys.moe.routing import Routing
from moesys.moe.source import ExpertBank, ResidentSource
from moesys.moe.swiglu import SwiGLU


@dataclass(frozen=True)
class MoEConfig:
    """The shape of a MoE layer."""

    num_experts: int
    top_k: int
    intermediate_size: int
    """Inner width of one SwiGLU expert."""
    normalize_top_k: bool = True
    """Whether a token's weights are scaled to sum to one."""
    shared_intermediate_size: int = 0
    """Inner width of an expert that every token passes; 0 for none."""


class MoELayer(nn.Module):
    """A Mixture-of-Experts feed-forward layer. Drops into any `nn.Module` where a feed-forward layer stood.

    Dropless: each (token, choice) is computed exactly once. ``forward`` takes (..., hidden) and returns the same
    shape with the `Routing` of its tokens, from which balance losses and telemetry are computed.
    """

    def __init__(self, hidden_size: int, config: MoEConfig, *, layer_id: int = 0) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.router = TopKRouter(
            hidden_size, config.num_experts, config.top_k, normalize=config.normalize_top_k
        )
        self.experts = ExpertBank(config.num_experts, hidden_size, config.intermediate_size)
        self.shared_expert = (
            SwiGLU(hidden_size, config.shared_intermediate_size) if config.shared_intermediate_size else None
        )
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws every weight from a normal distribution with standard deviation ``std``."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    def forward(self, x: Tensor, execution: Execution | None = None) -> tuple[Tensor, Routing]:
        """Computes the layer; without an `Execution` everything is local and resident. Raises `ShapeError`."""
        hidden_size = self.router.weight_ED.shape[1]
        if x.shape[-1] != hidden_size:
            raise ShapeError(
                f"the last dimension of x ({x.shape[-1]}) must be the layer's hidden size ({hidden_size})"
            )
        if execution is None:
            execution = Execution(LocalDispatcher(), ResidentSource({self.layer_id: self.experts}))
        # Under autocast the layer before may hand over another dtype than the experts compute in.
        x_TD = x.reshape(-1, hidden_size).to(self.experts.gate_up_EFD.dtype)
        routing = self._route(x_TD, execution)
        execution.source.hint(self.layer_id, routing)
        y_TD = self._compute_experts(x_TD, routing, execution)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view(x.shape).to(x.dtype), routing

    def _route(self, x_TD: Tensor, execution: Execution) -> Routing:
        tape = execution.tape
        routing = self.router(x_TD, None if tape is None else tape.replayed_expert_ids)
        if tape is not None:
            tape.record(routing.expert_ids.view(routing.num_tokens, self.router.top_k))
        return routing

    def _compute_experts(self, x_TD: Tensor, routing: Routing, execution: Execution) -> Tensor:
        total_TD: Tensor | None = None
        for part in execution.dispatcher.dispatch(x_TD, routing):
            y_TD = execution.dispatcher.combine(self._compute_part(part, execution), part.handle)
            total_TD = y_TD if total_TD is None else total_TD + y_TD
        return torch.zeros_like(x_TD) if total_TD is None else total_TD

    def _compute_part(self, part: Part, execution: Execution) -> Tensor:
        """Computes the views as they arrive. A lone view sums in the kernel; several are summed when all are done,
        so that the order of the sum is the order of the choices and never the order of arrival."""
        y_AD: Tensor | None = None
        for view in execution.source.acquire(self.layer_id, part.rows.offsets):
            try:
                if view.covers_all:
                    return compute_experts_summed(
                        part.rows, view, part.weights_A, part.token_sum, execution.kernel
                    )
                view_y_AD = compute_experts(part.rows, view, execution.kernel)
            finally:
                execution.source.release(self.layer_id, view)
            y_AD = view_y_AD if y_AD is None else y_AD + view_y_AD
        if y_AD is None:
            raise ShapeError(f"the expert source yielded no view for layer {self.layer_id}")
        return sum_rows(y_AD, part.weights_A, part.token_sum)
