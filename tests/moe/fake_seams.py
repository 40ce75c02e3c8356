"""Dispatchers and expert sources that cut the work differently from the local, resident ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
        for span in (slice(0, self._cut), slice(self._cut, routing.num_tokens)):
            offsets = routing.token_offsets[span.start : span.stop + 1]
            assignments = slice(int(offsets[0]), int(offsets[-1]))
            cut = Routing(
                routing.expert_ids[assignments],
                routing.weights[assignments],
                offsets - offsets[0],
                routing.num_experts,
                fixed_k=routing.fixed_k,
                dropped=None if routing.dropped is None else routing.dropped[assignments],
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
            left_out = ~torch.isin(routing.expert_ids, torch.tensor(group))
            if routing.dropped is not None:
                left_out |= routing.dropped
            yield from LocalDispatcher().dispatch(x_TD, replace(routing, dropped=left_out))

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


@dataclass(frozen=True)
class Delivery:
    """A view on its way.

    slots:  what lies in each slot: an expert, several times where it is repeated, or None for NaN rubbish.
    delay:  views arrive by it, whatever their order in the list.
    """

    slots: Sequence[int | None]
    delay: int = 0


class DeliverySource:
    """Yields partial views in the order of their delays and writes down what it is asked."""

    def __init__(self, bank: ExpertBank, deliveries: Sequence[Delivery]) -> None:
        self._bank = bank
        self._deliveries = sorted(deliveries, key=lambda delivery: delivery.delay)
        self.calls: list[str] = []
        self.demands: list[list[int]] = []

    def hint(self, layer_id: int, routing: Routing) -> None:
        self.calls.append(f"hint {layer_id}")

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView]:
        self.demands.append(demand.tolist())
        for delivery in self._deliveries:
            self.calls.append(f"lend {layer_id}")
            yield self._make_view(delivery, demand.shape[0] - 1)

    def release(self, layer_id: int, view: BankView) -> None:
        self.calls.append(f"release {layer_id}")

    def _make_view(self, delivery: Delivery, num_experts: int) -> BankView:
        held = [0 if expert is None else expert for expert in delivery.slots]
        rubbish = torch.tensor([expert is None for expert in delivery.slots]).view(-1, 1, 1)
        table = torch.full((num_experts,), -1)
        for slot, expert in enumerate(delivery.slots):
            if expert is not None:
                table[expert] = slot
        gate_up, down = (
            bank[held].masked_fill(rubbish, float("nan"))
            for bank in (self._bank.gate_up_EFD, self._bank.down_EDF)
        )
        return BankView(gate_up, down, table, form=self._bank.form)
