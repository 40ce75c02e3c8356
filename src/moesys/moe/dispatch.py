"""The first seam: how tokens travel to the experts and back.

`Dispatcher.dispatch` yields parts, each with its rows on the compute device, the routing weight of every
assignment, and a handle that only `combine` reads. Locally nothing travels: the rows are the layer's own input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moesys.kernels import Rows, TokenSum
from moesys.kernels import routing as routing_kernels
from moesys.moe.routing import Routing


@dataclass(frozen=True)
class Part:
    """Rows that are ready to be computed on this device.

    weights_A:   (assignments,) routing weights in the order of ``rows.row_ids``, applied where rows are summed.
    token_sum:   which assignments sum up to which returned row, in the order of the token's choices.
    num_served:  assignments of this device's own Routing whose results come home with this part: those of its rows
                 where none come from elsewhere. The layer checks that no assignment is left out.
    handle:      read by the dispatcher's own `combine` and by nobody else.
    """

    rows: Rows
    weights_A: Tensor
    token_sum: TokenSum
    num_served: int
    handle: Any = None


class Dispatcher(Protocol):
    """Moves tokens to the experts and the results back."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Iterator[Part]:
        """Yields one or more parts that together hold every assignment that is not dropped, exactly once."""
        ...

    def combine(self, y_RD: Tensor, handle: Any) -> Tensor:
        """Takes the summed rows of one part and returns their (tokens, hidden) contribution to the layer's output."""
        ...


class LocalDispatcher:
    """All experts are on this device: one part, nothing copied."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Iterator[Part]:
        """See `Dispatcher`. Sorts the assignments by expert, stably, so that equal input gives equal order."""
        ids, offsets = routing.expert_ids, routing.token_offsets
        if routing.dropped is None and routing_kernels.takes(routing.weights, ids, offsets):
            yield _group_in_kernel(x_TD, routing)
        else:
            yield _group_in_torch(x_TD, routing)

    def combine(self, y_RD: Tensor, handle: Any) -> Tensor:
        """See `Dispatcher`. The rows are the tokens already."""
        return y_RD


def _group_in_kernel(x_TD: Tensor, routing: Routing) -> Part:
    row_ids, offsets, weights_A, positions = routing_kernels.group_by_expert(
        routing.expert_ids, routing.weights, routing.token_offsets, routing.num_experts
    )
    return Part(
        rows=Rows(x_TD, row_ids, offsets),
        weights_A=weights_A,
        token_sum=TokenSum(positions, routing.token_offsets),
        num_served=routing.num_assignments,
    )


def _group_in_torch(x_TD: Tensor, routing: Routing) -> Part:
    order = routing.expert_ids.argsort(stable=True)
    token_offsets = routing.token_offsets
    if routing.dropped is not None:
        order = order[~routing.dropped[order]]
        kept = (~routing.dropped).long().cumsum(0)
        token_offsets = torch.cat([kept.new_zeros(1), kept])[token_offsets]
    counts = torch.bincount(routing.expert_ids[order], minlength=routing.num_experts)
    positions = torch.full_like(routing.expert_ids, -1)
    positions[order] = torch.arange(order.shape[0], device=order.device)
    return Part(
        rows=Rows(
            x_RD=x_TD,
            row_ids=routing.compute_token_ids()[order],
            offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        ),
        weights_A=routing.weights[order],
        token_sum=TokenSum(
            positions=positions if routing.dropped is None else positions[positions >= 0],
            offsets=token_offsets,
        ),
        num_served=order.shape[0],
    )
