"""Guesses which experts the next layer will need, so that they can be read before it asks.

A predictor sees the routing of each layer as it is made and names experts of the layer that follows, likeliest first.
It knows nothing of slots or files, and a wrong guess costs time but never correctness. Each is one rule of the
literature; which of them is worth its reads is for `ScoredPredictor` to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from moesys.moe.expert_key import ExpertKey
from moesys.moe.router import Router
from moesys.moe.routing import Routing
from moesys.moe.routing_log import RoutingLog


class Predictor(Protocol):
    """Told of every layer's routing, in the order in which tokens pass the layers; then asked."""

    def observe(self, layer_id: int, routing: Routing, x_TD: Tensor | None) -> None:
        """Takes note of what a layer decided.

        x_TD: (tokens, hidden) what the layer's router saw; None where the caller does not have it.
        """
        ...

    def guess(self, layer_id: int) -> Sequence[ExpertKey]:
        """Returns experts of the layer that follows ``layer_id``, which was observed last; likeliest first. After the
        last layer comes the first. Empty where there is nothing to go by."""
        ...


class NextLayer:
    """All experts of the next layer in order: right where everything is needed."""

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        """num_experts: by layer."""
        self._num_experts = dict(num_experts)
        self._following = _follow(num_experts)

    def observe(self, layer_id: int, routing: Routing, x_TD: Tensor | None) -> None:
        """See `Predictor`. Nothing is learned."""

    def guess(self, layer_id: int) -> Sequence[ExpertKey]:
        """See `Predictor`."""
        following = self._following[layer_id]
        return [(following, expert) for expert in range(self._num_experts[following])]


class LastIteration:
    """What the next layer needed in the step before, as many as this layer needs now: MoESys' rule (arXiv 2205.10034,
    2D prefetch)."""

    def __init__(self, layer_ids: Iterable[int]) -> None:
        self._following = _follow(layer_ids)
        self._last: dict[int, list[int]] = {}

    def observe(self, layer_id: int, routing: Routing, x_TD: Tensor | None) -> None:
        """See `Predictor`."""
        self._last[layer_id] = _rank_experts(routing)

    def guess(self, layer_id: int) -> Sequence[ExpertKey]:
        """See `Predictor`."""
        following, num_needed = self._following[layer_id], len(self._last.get(layer_id, ()))
        return [(following, expert) for expert in self._last.get(following, ())[:num_needed]]


class SamplePaths:
    """Where tokens that chose an expert in this layer went in the next one: Lina's statistics (USENIX ATC'23, section
    5.2) for paths of one layer.

    For each layer it counts how often a token with expert e there had expert f in the next, online and from a
    `RoutingLog`. The guess is the experts with the most expected tokens, as many as this layer needs.
    """

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        """num_experts: by layer."""
        layer_ids = sorted(num_experts)
        self._following = dict(pairwise(layer_ids))
        self._before = {layer_id: before for before, layer_id in self._following.items()}
        self._counts_EF = {
            before: torch.zeros(num_experts[before], num_experts[layer_id])
            for layer_id, before in self._before.items()
        }
        self._seen_TE: dict[int, Tensor] = {}

    def learn(self, log: RoutingLog) -> None:
        """Adds the counts of a log of the same layers."""
        tables = {i: _mark(log.expert_ids[i].long(), log.num_experts[i]) for i in log.layer_ids}
        for before, counts_EF in self._counts_EF.items():
            counts_EF += tables[before].T @ tables[self._following[before]]

    def observe(self, layer_id: int, routing: Routing, x_TD: Tensor | None) -> None:
        """See `Predictor`."""
        table_TE = torch.zeros(routing.num_tokens, routing.num_experts)
        table_TE[routing.compute_token_ids(), routing.expert_ids] = 1
        before = self._before.get(layer_id)
        seen_TE = None if before is None else self._seen_TE.get(before)
        if before is not None and seen_TE is not None and seen_TE.shape[0] == routing.num_tokens:
            self._counts_EF[before] += seen_TE.T @ table_TE
        self._seen_TE[layer_id] = table_TE

    def guess(self, layer_id: int) -> Sequence[ExpertKey]:
        """See `Predictor`. Empty after the last layer: the first one gets another token."""
        if layer_id not in self._counts_EF or layer_id not in self._seen_TE:
            return []
        counts_EF, tokens_E = self._counts_EF[layer_id], self._seen_TE[layer_id].sum(dim=0)
        expected_F = (tokens_E / counts_EF.sum(dim=1).clamp_min(1)) @ counts_EF
        num_needed = min(int((tokens_E > 0).sum()), int((expected_F > 0).sum()))
        order = expected_F.sort(descending=True, stable=True).indices[:num_needed]
        return [(self._following[layer_id], expert) for expert in order.tolist()]


class EarlyRouter:
    """What the next layer's router chooses for what this layer's router saw (arXiv 2312.17238, section 3.2): the
    residual stream changes little from layer to layer.

    It listens to the routers from outside, by hooks that are gone after `close`; use it as a context.
    """

    def __init__(self, routers: Mapping[int, Router]) -> None:
        """routers: by layer, the model's own."""
        self._routers = dict(routers)
        layer_ids = sorted(routers)
        self._following = dict(pairwise(layer_ids))
        self._seen: tuple[int, Tensor] | None = None
        self._hooks = [
            router.register_forward_pre_hook(self._make_hook(layer_id))
            for layer_id, router in routers.items()
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Listens no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen = None

    def observe(self, layer_id: int, routing: Routing, x_TD: Tensor | None) -> None:
        """See `Predictor`."""
        if x_TD is not None:
            self._seen = (layer_id, x_TD)

    @torch.no_grad()
    def guess(self, layer_id: int) -> Sequence[ExpertKey]:
        """See `Predictor`. Empty after the last layer."""
        following = self._following.get(layer_id)
        if following is None or self._seen is None or self._seen[0] != layer_id:
            return []
        routing = self._routers[following].forward(self._seen[1])
        return [(following, expert) for expert in _rank_experts(routing)]

    def _make_hook(self, layer_id: int) -> Any:
        def listen(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._seen = (layer_id, arguments[0])

        return listen


def _follow(layer_ids: Iterable[int]) -> dict[int, int]:
    """Returns the layer after each, the first after the last."""
    order = sorted(layer_ids)
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def _rank_experts(routing: Routing) -> list[int]:
    """Returns the experts that are needed, those of most tokens first; among equals by place in the choices."""
    ids = routing.expert_ids
    if routing.fixed_k is not None:
        ids = ids.view(-1, routing.fixed_k).T.flatten()
    return [expert for expert, _ in Counter(ids.tolist()).most_common()]


def _mark(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Returns (tokens, experts) float32, 1 where a token has an expert; an id of -1 is none."""
    table_TE = torch.zeros(ids_TK.shape[0], num_experts + 1)
    return table_TE.scatter_(1, ids_TK.where(ids_TK >= 0, num_experts), 1)[:, :num_experts]
