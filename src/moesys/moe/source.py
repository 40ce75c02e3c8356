"""The second seam: how expert weights reach the kernel.

`ExpertSource.acquire` yields bank views in the order in which they become ready; the layer computes them as they
come and releases each. Resident weights are one constant view that needs no look at the routing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from moesys.errors import ShapeError
from moesys.kernels import BankView
from moesys.moe.routing import Routing


class ExpertBank(nn.Module):
    """The stacked SwiGLU weights of a layer's experts.

    gate_up_EFD: (experts, 2 * inner, hidden), gate rows first. down_EDF: (experts, hidden, inner).
    """

    def __init__(self, num_experts: int, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_up_EFD = nn.Parameter(torch.empty(num_experts, 2 * inner_size, hidden_size))
        self.down_EDF = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size))

    @property
    def view(self) -> BankView:
        """All experts, each in the slot of its own number."""
        return BankView(self.gate_up_EFD, self.down_EDF)


class ExpertSource(Protocol):
    """Owns or fetches expert weights and lends them as bank views."""

    def hint(self, layer_id: int, routing: Routing) -> None:
        """Tells which experts a layer is about to need; may start loads, may do nothing."""
        ...

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView]:
        """Yields views that together hold every expert with rows.

        demand: (experts + 1,) int64 group offsets of the dispatched rows. A view is pinned until released.
        """
        ...

    def release(self, layer_id: int, view: BankView) -> None:
        """Says that a view is no longer read."""
        ...


class ResidentSource:
    """Weights that never move: one view per layer that covers every expert."""

    def __init__(self, banks: Mapping[int, ExpertBank]) -> None:
        self._banks = dict(banks)

    def hint(self, layer_id: int, routing: Routing) -> None:
        """See `ExpertSource`. There is nothing to load."""

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView]:
        """See `ExpertSource`. Does not look at the demand."""
        if layer_id not in self._banks:
            raise ShapeError(
                f"layer {layer_id} has no experts in this source; it holds layers {sorted(self._banks)}"
            )
        yield self._banks[layer_id].view

    def release(self, layer_id: int, view: BankView) -> None:
        """See `ExpertSource`. Nothing was pinned."""
