"""Expert weights that do not all fit: kept in the slots of a cache, read from the disk when tokens need them.

`acquire` hands out what is there at once and the rest as it arrives, in as many views as that takes, so that reading
and computing overlap and any number of slots serves any demand. Which expert leaves is the cache's policy. Results do
not depend on any of it: the layer sums in the order of the choices whatever the order of arrival. For inference: a slot
that autograd has saved would hold another expert by the time of the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moesys.errors import SectionReadError, ShapeError, TrainingError
from moesys.kernels import BankView, ModuleView
from moesys.moe.routing import Routing
from moesys.moe.slot_layout import SlotLayout
from moesys.store import SectionCache

ExpertKey = tuple[int, int]
"""(layer, expert): the key of an expert's section in a cache."""


@dataclass(frozen=True)
class CachedLayer:
    """Where the experts of a layer are kept.

    cache:   holds sections by `ExpertKey`.
    layout:  what its slots hold.
    """

    cache: SectionCache
    num_experts: int
    layout: SlotLayout


@dataclass(frozen=True)
class _Loan:
    """A view that was handed out and not released, and what stays pinned for it."""

    view: BankView | ModuleView
    cache: SectionCache
    keys: tuple[ExpertKey, ...]


class CachedSource:
    """Lends experts out of caches. Layers of the same shape share one."""

    def __init__(self, layers: Mapping[int, CachedLayer], *, share_to_stream: float = 0.5) -> None:
        """share_to_stream: the share of a layer's experts from which on a demand is taken as a pass over everything, in
        which the next layer is read ahead."""
        self._layers = dict(layers)
        self._share_to_stream = share_to_stream
        self._next = dict(pairwise(sorted(layers)))
        self._loans: dict[int, _Loan] = {}

    def hint(self, layer_id: int, routing: Routing) -> None:
        """See `ExpertSource`. The demand comes at once, so there is nothing to gain."""

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView | ModuleView]:
        """See `ExpertSource`. Waits for the disk where nothing is ready.

        Raises `SectionReadError` for weights that cannot be read or whose files were closed, `ShapeError` when views
        that were not released hold all slots, and `TrainingError` where gradients are enabled.
        """
        if layer_id not in self._layers:
            raise ShapeError(
                f"layer {layer_id} has no experts in this source; it holds layers {sorted(self._layers)}"
            )
        if torch.is_grad_enabled():
            raise TrainingError(
                f"layer {layer_id}: experts that are read from the disk have no gradients, and their slots are filled "
                "anew before a backward pass could read them; run the model under torch.no_grad(), or load it as a "
                "whole to train it"
            )
        layer = self._layers[layer_id]
        cache = layer.cache
        cache.begin_turn()
        wanted = [(layer_id, expert) for expert in (demand.diff() > 0).nonzero().flatten().tolist()]
        may_read_ahead = len(wanted) >= self._share_to_stream * layer.num_experts
        left, pinned = dict.fromkeys(wanted), set[ExpertKey]()
        try:
            for key in wanted:
                cache.demand(key)
                if cache.is_here(key):
                    cache.pin(key)
                    pinned.add(key)
            while left:
                all_started = self._start(cache, left, pinned)
                if all_started and may_read_ahead:
                    self._read_ahead(layer_id)
                    may_read_ahead = False
                ready = [key for key in left if cache.is_ready(key) and key in pinned]
                if not ready:
                    self._wait(cache, [key for key in left if key in pinned])
                    continue
                for key in ready:
                    del left[key]
                    pinned.discard(key)
                yield self._lend(layer, ready)
        except SectionReadError:
            # What fails for the same reason shall not be met by the next who asks for it.
            cache.settle(list(pinned))
            raise
        finally:
            for key in pinned:
                cache.unpin(key)

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """See `ExpertSource`. Raises `ShapeError` for a view that is not lent, or is no longer."""
        loan = self._loans.pop(id(view), None)
        if loan is None:
            raise ShapeError(
                f"layer {layer_id}: this view is not lent; release each view that was acquired once"
            )
        for key in loan.keys:
            loan.cache.unpin(key)

    def _start(self, cache: SectionCache, left: Mapping[ExpertKey, None], pinned: set[ExpertKey]) -> bool:
        """Starts reading what is not on its way while slots last; returns whether everything is."""
        for key in left:
            if key in pinned:
                continue
            if not cache.is_here(key) and not cache.start(key):
                return False
            cache.pin(key)
            pinned.add(key)
        return True

    def _wait(self, cache: SectionCache, keys: Sequence[ExpertKey]) -> None:
        if not cache.wait_any(keys):
            raise ShapeError(
                f"all {cache.pool.num_slots} slots are held by {len(self._loans)} views that were not released; "
                "release each view before the next is needed, or have more slots"
            )

    def _read_ahead(self, layer_id: int) -> None:
        """Prefetches the experts of the next layer, as many as find a slot; none after the last layer."""
        next_id = self._next.get(layer_id)
        if next_id is None or self._layers[next_id].cache is not self._layers[layer_id].cache:
            return
        following = self._layers[next_id]
        keys = dict.fromkeys((next_id, expert) for expert in range(following.num_experts))
        for key in keys:
            if not following.cache.is_here(key) and not following.cache.prefetch(key, spared=keys):
                return

    def _lend(self, layer: CachedLayer, keys: Sequence[ExpertKey]) -> BankView:
        """Makes a view of experts that are ready; their pins are the view's from now on."""
        slots = [layer.cache.use(key) for key in keys]
        table = torch.full((layer.num_experts,), -1, dtype=torch.int64)
        table[[expert for _, expert in keys]] = torch.tensor(slots)
        view = layer.layout.make_view(layer.cache.pool.parts, table)
        self._loans[id(view)] = _Loan(view, layer.cache, tuple(keys))
        return view
