"""The MoE layer: a router, a dispatcher and an expert source, siblings that can each be swapped alone.

The layer knows nothing of ranks, tiers or files. It routes, lets the dispatcher bring rows, computes bank views
as they arrive, and lets the dispatcher take the results home.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.errors import RoutingError, ShapeError
from moesys.kernels import (
    Adapters,
    BankView,
    Kernel,
    ModuleView,
    Rows,
    compute_experts,
    compute_experts_summed,
    fill_expert_rows,
    new_expert_rows,
    sum_rows,
    use_kernel,
)
from moesys.moe.choice import Choice
from moesys.moe.config import MoEConfig
from moesys.moe.coverage import require_all_served, require_each_expert_once
from moesys.moe.dispatch import LocalDispatcher, Part
from moesys.moe.execution import Execution
from moesys.moe.linear import Linear
from moesys.moe.mlp import make_dense
from moesys.moe.residual import ResidualBranch
from moesys.moe.router import Router, make_router
from moesys.moe.routing import Routing
from moesys.moe.source import ExpertBank, ModuleBank, QuantizedBank, ResidentSource
from moesys.moe.swiglu import SwiGLU


class MoELayer(nn.Module):
    """A Mixture-of-Experts feed-forward layer. Drops into any `nn.Module` where a feed-forward layer stood.

    Dropless unless the config or the `Execution` sets a capacity: each (token, choice) is computed exactly once.
    ``forward`` takes (..., hidden) and returns the same shape with the `Routing` of its tokens, from which balance
    losses and telemetry are computed.
    """

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        *,
        layer_id: int = 0,
        router: Router | None = None,
        experts: ModuleBank | None = None,
    ) -> None:
        """``router`` and ``experts`` replace those that the config describes. Raises `RoutingError` or `ShapeError` for
        a config that cannot be built, for other numbers of experts than the config's, and for a ``bias_update_rate``
        beside a router without a bias. ``layer_id`` must differ between the layers of a model; see `find_layers`."""
        super().__init__()
        self.layer_id = layer_id
        self.hidden_size = hidden_size
        self.capacity = config.capacity
        self.bias_update_rate = config.bias_update_rate
        self.router = make_router(hidden_size, config) if router is None else router
        self._given_parameters = set() if router is None else set(router.parameters())
        shape = (hidden_size, config.intermediate_size, config.form, config.expert_bias)
        self.experts: ExpertBank | QuantizedBank | ModuleBank = (
            ExpertBank(config.num_experts, *shape) if experts is None else experts
        )
        self.residual = ResidualBranch(hidden_size, make_dense(*shape)) if config.is_residual else None
        self.shared_expert = (
            SwiGLU(hidden_size, config.shared_intermediate_size) if config.shared_intermediate_size else None
        )
        self.shared_expert_gate = Linear(hidden_size, 1, bias=False) if config.shared_expert_gate else None
        found = (self.router.num_experts, self.experts.view.num_slots)
        if found != (config.num_experts, config.num_experts):
            raise ShapeError(
                f"the router has {found[0]} experts and the bank {found[1]}; both must have num_experts "
                f"({config.num_experts})"
            )
        if config.bias_update_rate > 0 and self.router.selection_bias_E is None:
            raise RoutingError(
                f"bias_update_rate ({config.bias_update_rate}) has no effect on a router without a selection bias; "
                "make the router with has_selection_bias=True, or drop the rate"
            )
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draws weights from a normal distribution with standard deviation ``std`` and zeroes biases; a router and
        experts that the layer was given stay as they are."""
        own = set(self._given_parameters)
        if not isinstance(self.experts, ExpertBank):
            own.update(self.experts.parameters())
        for name, parameter in self.named_parameters():
            if parameter in own:
                continue
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def forward(
        self, x: Tensor, execution: Execution | None = None, *, given: Choice | None = None
    ) -> tuple[Tensor, Routing]:
        """Computes the layer; without an `Execution` everything is local and resident.

        given: the experts of each token, as in routing by task, instead of the router's choice; the weights are the
               router's. `Choice.from_table` makes one.

        The router sees x as it is, in float32; the experts see it in their own dtype.

        Raises `ShapeError` for an x of another width or of integers, for a source that leaves experts out and for a
        dispatcher that leaves assignments out; `RoutingError` for NaN or Inf in the router's logits, for given experts
        that do not exist or contradict the `Execution`'s top_k, and in training for a router that could not learn.
        """
        if x.shape[-1] != self.hidden_size:
            raise ShapeError(
                f"the last dimension of x ({x.shape[-1]}) must be the layer's hidden size ({self.hidden_size})"
            )
        if not x.is_floating_point():
            raise ShapeError(f"x must be floating point, got {x.dtype}; embed or cast it first")
        if execution is None:
            execution = Execution(LocalDispatcher(), ResidentSource({self.layer_id: self.experts}))
        with use_kernel(execution.kernel):
            y_TD, routing = self._compute(x.reshape(-1, self.hidden_size), execution, given)
        return y_TD.view(x.shape).to(x.dtype), routing

    def _compute(self, x_TD: Tensor, execution: Execution, given: Choice | None) -> tuple[Tensor, Routing]:
        routing = self._route(x_TD, execution, given)
        execution.source.hint(self.layer_id, routing)
        if isinstance(self.experts, ExpertBank | QuantizedBank):
            # Under autocast the layer before may hand over another dtype than the experts compute in.
            x_TD = x_TD.to(self.experts.row_dtype)
        y_TD = self._compute_experts(x_TD, routing, execution)
        if self.residual is not None:
            y_TD = self.residual(x_TD, y_TD)
        if self.shared_expert is not None:
            y_TD = y_TD + self._compute_shared(x_TD, self.shared_expert)
        return y_TD, routing

    def _route(self, x_TD: Tensor, execution: Execution, given: Choice | None) -> Routing:
        """Routes, checks and drops, or repeats what the tape says was decided."""
        if given is not None:
            self._check_given(given, execution.top_k)
        elif self._trains_router:
            self.router.require_learnable(execution.top_k)
        replayed = None if execution.tape is None else execution.tape.replayed
        routing = self.router(
            x_TD, top_k=execution.top_k, given=given if replayed is None else replayed.choice
        )
        if execution.checks_logits:
            self._require_finite(routing)
        capacity = self.capacity if execution.capacity is None else execution.capacity
        if capacity is not None:
            dropped = capacity.find_dropped(routing) if replayed is None else replayed.dropped
            is_normalized = self.router.is_normalized
            routing = capacity.mark(routing, dropped, is_normalized=is_normalized)
        if execution.tape is not None:
            execution.tape.record(routing)
        return routing

    @property
    def _trains_router(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.router.weight_ED.requires_grad

    def _check_given(self, given: Choice, top_k: int | None) -> None:
        if top_k is not None and given.fixed_k != top_k:
            number = "different numbers of" if given.fixed_k is None else given.fixed_k
            raise RoutingError(
                f"the given choice has {number} experts per token, which contradicts the Execution's top_k ({top_k}); "
                "drop top_k, or give each token as many experts"
            )
        ids, num_experts = given.expert_ids, self.router.num_experts
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
            raise RoutingError(
                f"given expert ids must be between 0 and {num_experts - 1}, got {int(ids.min())} to {int(ids.max())}"
            )

    def _require_finite(self, routing: Routing) -> None:
        """Where the router has not looked, one sum finds NaN and Inf; only when it is not finite are tokens counted (it
        may have overflowed)."""
        if routing.is_finite:
            return
        if routing.logits_TE is None or bool(routing.logits_TE.detach().sum().isfinite()):
            return
        num_bad = int((~routing.logits_TE.isfinite()).any(dim=1).sum())
        if num_bad:
            raise RoutingError(
                f"layer {self.layer_id}: router logits are NaN or Inf for {num_bad} of {routing.num_tokens} tokens; "
                "look for NaN in the layer's input and in its router's weight"
            )

    def _compute_experts(self, x_TD: Tensor, routing: Routing, execution: Execution) -> Tensor:
        total_TD: Tensor | None = None
        num_served = 0
        for part in execution.dispatcher.dispatch(x_TD, routing):
            y_TD = execution.dispatcher.combine(self._compute_part(part, execution), part.handle)
            total_TD = y_TD if total_TD is None else total_TD + y_TD
            num_served += part.num_served
        require_all_served(self.layer_id, routing, num_served)
        return torch.zeros_like(x_TD) if total_TD is None else total_TD

    def _compute_shared(self, x_TD: Tensor, expert: SwiGLU) -> Tensor:
        if self.shared_expert_gate is None:
            return expert(x_TD)
        return self.shared_expert_gate(x_TD).sigmoid() * expert(x_TD)

    def _compute_part(self, part: Part, execution: Execution) -> Tensor:
        """Computes the views as they arrive. A lone view sums in the kernel; several are summed when all are done,
        so that the order of the sum is the order of the choices and never the order of arrival."""
        adapters = None if execution.adapters is None else execution.adapters.get(self.layer_id)
        tables: list[Tensor] = []
        y_AD: Tensor | None = None
        views = execution.source.acquire(self.layer_id, part.rows.offsets)
        try:
            for view in views:
                try:
                    if view.slot_of_expert is None:
                        return compute_experts_summed(
                            part.rows, view, part.weights_A, part.token_sum, adapters, kernel=execution.kernel
                        )
                    y_AD = _add_view(y_AD, part.rows, view, adapters, execution.kernel)
                    tables.append(view.slot_of_expert)
                finally:
                    execution.source.release(self.layer_id, view)
        finally:
            # Whatever happened, the source keeps nothing for views that will not be asked for.
            if not torch.compiler.is_compiling():
                views.close()
        require_each_expert_once(self.layer_id, part.rows.offsets, tables)
        if y_AD is None:
            y_AD = part.rows.x_RD.new_zeros(0, part.rows.x_RD.shape[1])
        y_AD = y_AD.to(part.rows.x_RD.dtype)
        return sum_rows(y_AD, part.weights_A, part.token_sum, execution.kernel)


def _add_view(
    y_AD: Tensor | None, rows: Rows, view: BankView | ModuleView, adapters: Adapters | None, kernel: Kernel
) -> Tensor:
    """Returns the rows of the views before, None for the first, with those of one more. Without gradients they are
    written in place, each once."""
    if torch.is_grad_enabled():
        view_y_AD = compute_experts(rows, view, adapters, kernel=kernel)
        return view_y_AD if y_AD is None else y_AD + view_y_AD
    if y_AD is None:
        y_AD = new_expert_rows(rows)
    fill_expert_rows(y_AD, rows, view, adapters, kernel)
    return y_AD
