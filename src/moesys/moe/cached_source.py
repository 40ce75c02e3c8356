"""Expert weights that do not all fit: kept in the slots of a cache, read from the disk when tokens need them.

`acquire` hands out what is there at once and the rest as it arrives, in as many views as that takes, so that reading
and computing overlap and any number of slots serves any demand. Which expert leaves is the cache's policy. Results do
not depend on any of it: the layer sums in the order of the choices whatever the order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels import BankView, ExpertForm, ModuleView
from moesys.moe.routing import Routing
from moesys.store import SectionCache, Urgency

ExpertKey = tuple[int, int]
"""(layer, expert): the key of an expert's section in a cache."""


@dataclass(frozen=True)
class CachedLayer:
    """Where the experts of a layer are kept.

    cache:  holds sections by `ExpertKey`; its slots have the parts gate_up and down, then both biases if there are any.
    """

    cache: SectionCache
    num_experts: int
    form: ExpertForm


class CachedSource:
    """Lends experts out of caches. Layers of the same shape share one."""

    def __init__(self, layers: Mapping[int, CachedLayer], *, share_to_stream: float = 0.5) -> None:
        """share_to_stream: the share of a layer's experts from which on a demand is taken as a pass over everything, in
        which the next layer is read ahead."""
        self._layers = dict(layers)
        self._share_to_stream = share_to_stream
        order = sorted(layers)
        self._next = dict(zip(order, order[1:] + order[:1], strict=True))

    def hint(self, layer_id: int, routing: Routing) -> None:
        """See `ExpertSource`. The demand comes at once, so there is nothing to gain."""

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView | ModuleView]:
        """See `ExpertSource`. Raises `SectionReadError` for weights that cannot be read."""
        if layer_id not in self._layers:
            raise ShapeError(
                f"layer {layer_id} has no experts in this source; it holds layers {sorted(self._layers)}"
            )
        layer = self._layers[layer_id]
        cache = layer.cache
        cache.collect()
        wanted = [(layer_id, expert) for expert in (demand.diff() > 0).nonzero().flatten().tolist()]
        streams = len(wanted) >= self._share_to_stream * layer.num_experts
        left, held = set(wanted), set[ExpertKey]()
        try:
            for key in wanted:
                cache.demand(key)
                if cache.is_here(key):
                    cache.pin(key)
                    held.add(key)
            while left:
                if self._start(cache, wanted, left, held) and streams:
                    self._read_ahead(layer_id)
                ready = [key for key in wanted if key in left and cache.is_ready(key)]
                if not ready:
                    cache.wait_any([key for key in held if key in left])
                    continue
                left.difference_update(ready)
                yield self._make_view(layer, {key: cache.use(key) for key in ready})
                for key in ready:
                    held.discard(key)
                    cache.unpin(key)
        finally:
            for key in held:
                cache.unpin(key)

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """See `ExpertSource`. A view is unpinned when the next one is asked for."""

    def _start(
        self, cache: SectionCache, wanted: list[ExpertKey], left: set[ExpertKey], held: set[ExpertKey]
    ) -> bool:
        """Starts reading what is not on its way while slots last; returns whether everything is."""
        for key in wanted:
            if key not in left or key in held:
                continue
            if not cache.start(key, Urgency.DEMAND):
                return False
            cache.pin(key)
            held.add(key)
        return True

    def _read_ahead(self, layer_id: int) -> None:
        """Prefetches the experts of the next layer, as many as find a slot."""
        next_id = self._next[layer_id]
        following = self._layers[next_id]
        if following.cache is not self._layers[layer_id].cache or next_id == layer_id:
            return
        for expert in range(following.num_experts):
            key = (next_id, expert)
            if not following.cache.is_here(key) and not following.cache.start(key, Urgency.PREFETCH):
                return

    def _make_view(self, layer: CachedLayer, slots: Mapping[ExpertKey, int]) -> BankView:
        table = torch.full((layer.num_experts,), -1, dtype=torch.int64)
        table[[expert for _, expert in slots]] = torch.tensor(list(slots.values()))
        gate_up, down, *biases = layer.cache.pool.parts
        gate_up_bias, down_bias = biases or (None, None)
        return BankView(gate_up, down, table, layer.form, gate_up_bias, down_bias)
