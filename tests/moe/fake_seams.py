"""Dispatchers and expert sources that cut the work differently from the local, resident ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moesys.kernels import BankView
from moesys.moe import ExpertBank, LocalDispatcher, Part, Routing


def make_routing(
    choices: Sequence[Sequence[int]],
    num_experts: int,
    *,
    weights: Sequence[float] | None = None,
    dropped: Sequence[bool] | None = None,
    **fields: Any,
) -> Routing:
    """A routing from each token's list of experts; the weights count up from 1 unless given."""
    flat = [expert for experts in choices for expert in experts]
    values = range(1, len(flat) + 1) if weights is None else weights
    return Routing(
        expert_ids=torch.tensor(flat, dtype=torch.int64),
        weights=torch.tensor(list(values), dtype=torch.float32),
        token_offsets=torch.tensor([0, *(len(experts) for experts in choices)]).cumsum(0),
        num_experts=num_experts,
        dropped=None if dropped is None else torch.tensor(list(dropped), dtype=torch.bool),
        **fields,
    )


class TokenCutDispatcher:
    """Two parts: the tokens before ``cut`` and those after it."""

    def __init__(self, cut: int) -> None:
        self._cut = cut

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Iterator[Part]:
        assert routing.fixed_k is not None
        for span in (slice(0, self._cut), slice(self._cut, routing.num_tokens)):
            num_tokens, k = span.stop - span.start, routing.fixed_k
            assignments = slice(span.start * k, span.stop * k)
            cut = Routing(
                routing.expert_ids[assignments],
                routing.weights[assignments],
                torch.arange(num_tokens + 1) * k,
                routing.num_experts,
                fixed_k=k,
            )
            (part,) = LocalDispatcher().dispatch(x_TD[span], cut)
            yield replace(part, handle=(span, routing.num_tokens))

    def combine(self, y_RD: Tensor, handle: Any) -> Tensor:
        span, num_tokens = handle
        return torch.nn.functional.pad(y_RD, (0, 0, span.start, num_tokens - span.stop))


class ExpertCutDispatcher:
    """One part per group of experts."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = groups

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Iterator[Part]:
        for group in self._groups:
            outside = ~torch.isin(routing.expert_ids, torch.tensor(group))
            yield from LocalDispatcher().dispatch(x_TD, replace(routing, dropped=outside))

    def combine(self, y_RD: Tensor, handle: Any) -> Tensor:
        assert handle is None
        return y_RD


class PiecewiseSource:
    """Yields one partial view per group of experts in the order given, slots reversed; watches the pins."""

    def __init__(self, bank: ExpertBank, groups: Sequence[Sequence[int]]) -> None:
        self._bank = bank
        self._groups = groups
        self.num_hints = 0
        self.num_pinned = 0
        self.max_pinned = 0

    def hint(self, layer_id: int, routing: Routing) -> None:
        self.num_hints += 1

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView]:
        num_experts = demand.shape[0] - 1
        for group in self._groups:
            held = list(reversed(group))
            table = torch.full((num_experts,), -1)
            table[held] = torch.arange(len(held))
            self.num_pinned += 1
            self.max_pinned = max(self.max_pinned, self.num_pinned)
            yield BankView(self._bank.gate_up_EFD[held], self._bank.down_EDF[held], table)

    def release(self, layer_id: int, view: BankView) -> None:
        self.num_pinned -= 1
