"""The router: from token activations to a `Routing`. Always in float32, whatever the model's arithmetic.

A router is composed of three small parts: a `Score`, a `Selection` and a `Normalization`. It knows nothing of
capacity, balance or where experts lie.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.errors import RoutingError
from moesys.kernels import linear
from moesys.kernels import routing as routing_kernels
from moesys.moe.choice import Choice
from moesys.moe.config import MoEConfig
from moesys.moe.routing import Routing
from moesys.moe.score import Score, compute_distribution, compute_scores
from moesys.moe.selection import Selection, TopK, require_unbiased_threshold
from moesys.moe.weighting import SMALLEST_SUM, Normalization, SparseMixer, Weighting, compute_weights


class Router(nn.Module):
    """A linear map to one logit per expert, then score, selection and weighting.

    weight_ED:         (experts, hidden) float32.
    bias_E:            (experts,) float32, added to the logits; None unless ``has_bias``.
    selection_bias_E:  (experts,) float32 buffer, added to the scores for choosing and never to the weights
                       (arXiv 2408.15664); None unless ``has_selection_bias``. `BiasBalancer` moves it.
    """

    selection_bias_E: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        selection: Selection,
        *,
        score: Score = Score.SOFTMAX,
        weighting: Weighting = Normalization.NONE,
        scale: float = 1.0,
        has_bias: bool = False,
        has_selection_bias: bool = False,
    ) -> None:
        """``scale`` multiplies every weight after normalisation. Raises `RoutingError` for an impossible selection, and
        for a bias on a `Threshold`."""
        super().__init__()
        selection.require_possible(num_experts)
        require_unbiased_threshold(selection, has_bias=has_selection_bias)
        self.weight_ED = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        nn.init.normal_(self.weight_ED, std=0.02)
        self.bias_E = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32)) if has_bias else None
        self.register_buffer("selection_bias_E", torch.zeros(num_experts) if has_selection_bias else None)
        self.selection = selection
        self.score = score
        self.weighting = weighting
        self.scale = scale

    @property
    def num_experts(self) -> int:
        return self.weight_ED.shape[0]

    @property
    def is_normalized(self) -> bool:
        """Whether the weights of a token sum to one, before the scale."""
        return self.weighting in (Normalization.AFTER, Normalization.BEFORE)

    def require_learnable(self, top_k: int | None = None) -> None:
        """Raises `RoutingError` when the weight of a lone expert, normalised, is the constant 1: the choice would get
        no gradient. Harmless where nothing is learned, as with a checkpoint that was made so.

        top_k: replaces the selection's k.
        """
        k = self.selection.k if top_k is None else top_k
        if k > 1 or self.num_experts == 1 or not self.is_normalized:
            return
        raise RoutingError(
            f"top_k ({k}) with normalisation makes the weight of every chosen expert the constant 1, so the router "
            "would learn nothing from the task loss; use weighting=Normalization.NONE or a top_k of at "
            "least 2, or for inference model.eval() or torch.no_grad()"
        )

    def forward(self, x_TD: Tensor, *, top_k: int | None = None, given: Choice | None = None) -> Routing:
        """Routes (tokens, hidden) of any float dtype.

        top_k:  replaces the selection's k in this call.
        given:  used instead of choosing, as for replay and for routing by task; the weights are still the router's.

        Raises `RoutingError` for an impossible k, or a given choice of other tokens.
        """
        logits_TE = self._compute_logits(x_TD)
        scores_TE = compute_scores(logits_TE, self.score)
        if given is None and self._takes_the_best and routing_kernels.takes(logits_TE):
            return self._route_in_kernel(logits_TE, scores_TE, self._find_selection(top_k).k)
        if given is None:
            given = self._choose(logits_TE.detach(), scores_TE.detach(), top_k)
        elif given.num_tokens != x_TD.shape[0]:
            raise RoutingError(
                f"the given choice is of {given.num_tokens} tokens, x has {x_TD.shape[0]}; give each token its experts"
            )
        weights = compute_weights(given, logits_TE, scores_TE, self.weighting)
        return Routing(
            expert_ids=given.expert_ids,
            weights=weights if self.scale == 1.0 else weights * self.scale,
            token_offsets=given.token_offsets,
            num_experts=self.num_experts,
            fixed_k=given.fixed_k,
            logits_TE=logits_TE,
            scores_TE=compute_distribution(scores_TE, self.score),
        )

    def _compute_logits(self, x_TD: Tensor) -> Tensor:
        weight_ED, bias_E = self.weight_ED, self.bias_E
        dtype = torch.promote_types(weight_ED.dtype, torch.float32)
        operands = (x_TD.to(dtype), weight_ED.to(dtype), None if bias_E is None else bias_E.to(dtype))
        if not torch.is_autocast_enabled(x_TD.device.type):
            return linear(*operands)
        with torch.autocast(x_TD.device.type, enabled=False):
            return linear(*operands)

    @property
    def _takes_the_best(self) -> bool:
        """Whether a token's weights are functions of its k best scores alone."""
        return isinstance(self.selection, TopK) and (
            self.weighting is Normalization.AFTER or self.weighting is Normalization.NONE
        )

    def _route_in_kernel(self, logits_TE: Tensor, scores_TE: Tensor, k: int) -> Routing:
        """Chooses, weighs and looks for NaN and Inf in one call."""
        bias_E = self.selection_bias_E
        expert_ids, token_offsets, weights, is_finite = routing_kernels.choose_and_weigh(
            logits_TE,
            scores_TE,
            None if bias_E is None else bias_E.to(scores_TE.dtype),
            k,
            SMALLEST_SUM if self.weighting is Normalization.AFTER else None,
            self.scale,
        )
        return Routing(
            expert_ids=expert_ids,
            weights=weights,
            token_offsets=token_offsets,
            num_experts=logits_TE.shape[1],
            fixed_k=k,
            logits_TE=logits_TE,
            scores_TE=compute_distribution(scores_TE, self.score),
            is_finite=is_finite,
        )

    def _find_selection(self, top_k: int | None) -> Selection:
        """Returns the selection, with another k where one is asked for. Raises `RoutingError` for an impossible one."""
        if top_k is None or top_k == self.selection.k:
            return self.selection
        selection = self.selection.with_k(top_k)
        selection.require_possible(self.num_experts)
        return selection

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, top_k: int | None) -> Choice:
        """Chooses by scores; by logits where weights are a softmax of them, because a softmax over all experts makes
        equal zeros of those far behind the first."""
        selection = self._find_selection(top_k)
        by_logits = self.weighting is Normalization.BEFORE or isinstance(self.weighting, SparseMixer)
        if by_logits and isinstance(selection, TopK) and self.selection_bias_E is None:
            scores_TE = logits_TE
        return selection.choose(
            scores_TE if self.selection_bias_E is None else scores_TE + self.selection_bias_E
        )


class TopKRouter(Router):
    """Softmax, then the k largest probabilities, scaled to sum to one with ``normalize``: Mixtral, Qwen3-MoE, OLMoE."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, normalize: bool = True) -> None:
        weighting = Normalization.AFTER if normalize else Normalization.NONE
        super().__init__(hidden_size, num_experts, TopK(top_k), weighting=weighting)


def make_router(hidden_size: int, config: MoEConfig) -> Router:
    """Makes the router that a layer's config describes. Raises `RoutingError` for an impossible selection."""
    return Router(
        hidden_size,
        config.num_experts,
        config.selection,
        score=config.score,
        weighting=config.weighting,
        scale=config.weight_scale,
        has_bias=config.router_bias,
        has_selection_bias=config.has_selection_bias,
    )
