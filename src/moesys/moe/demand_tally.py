"""Which experts each layer asked for, in the smallest form that can be replayed: a few bytes per expert and step."""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterator

from torch import Tensor

from moesys.kernels import BankView, ModuleView
from moesys.moe.expert_key import ExpertKey
from moesys.moe.routing import Routing
from moesys.moe.source import ExpertSource


class DemandTally:
    """An expert source that notes what is asked of the one behind it, which does the work."""

    def __init__(self, source: ExpertSource) -> None:
        self._source = source
        self._numbers = array("H")
        """For each demand its layer, the number of its experts, and these."""

    @property
    def num_bytes(self) -> int:
        """Of what was noted."""
        return len(self._numbers) * self._numbers.itemsize

    def clear(self) -> None:
        """Forgets what was noted."""
        del self._numbers[:]

    def demands(self) -> Iterator[tuple[ExpertKey, ...]]:
        """Yields what was asked for, demand by demand."""
        place = 0
        while place < len(self._numbers):
            layer_id, num_experts = self._numbers[place : place + 2]
            first = place + 2
            place = first + num_experts
            yield tuple((layer_id, expert) for expert in self._numbers[first:place])

    def hint(self, layer_id: int, routing: Routing) -> None:
        """See `ExpertSource`."""
        self._source.hint(layer_id, routing)

    def acquire(self, layer_id: int, demand: Tensor) -> Generator[BankView | ModuleView, None, None]:
        """See `ExpertSource`."""
        experts = (demand.diff() > 0).nonzero().flatten().tolist()
        self._numbers.extend((layer_id, len(experts), *experts))
        return self._source.acquire(layer_id, demand)

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """See `ExpertSource`."""
        self._source.release(layer_id, view)
