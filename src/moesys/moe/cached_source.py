"""Expert weights that do not all fit: kept in the slots of a cache, read from the disk when tokens need them.

`acquire` hands out what is there at once and the rest as it arrives, in as many views as that takes, so that reading
and computing overlap and any number of slots serves any demand. A demand of most of a layer is part of a pass over
everything, for which a `Ring` decides what leaves and reads ahead. For others the cache's policy decides, and a
predictor's guesses are read while nothing else is. Results do not depend on any of it: the layer sums in the order of
the choices whatever the order of arrival. For inference: a slot that autograd has saved would hold another expert by
the time of the backward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import SectionReadError, ShapeError, TrainingError
from moesys.kernels import BankView, ModuleView
from moesys.moe.expert_key import ExpertKey
from moesys.moe.predictors import Predictor
from moesys.moe.routing import Routing
from moesys.moe.slot_layout import SlotLayout
from moesys.store import SectionCache
from moesys.store.ring import Ring

SHARE_TO_STREAM = 0.8
"""Of a layer's experts from which on a demand is taken as part of a pass over everything. A pass also reads the others,
so that too low a share wastes reads."""

_PARTS_OF_STAYING = 8
"""In a pass, what stays is computed in so many views, between which what has arrived meanwhile makes room."""


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

    def __init__(
        self,
        layers: Mapping[int, CachedLayer],
        *,
        predictor: Predictor | None = None,
        share_to_stream: float = SHARE_TO_STREAM,
    ) -> None:
        """
        predictor:        whose guesses are read ahead; None reads nothing on a guess. It is not asked where everything
                          fits.
        share_to_stream:  see `SHARE_TO_STREAM`.
        """
        self.uses: Counter[ExpertKey] = Counter()
        """How often each expert was lent: what a `UsageProfile` is made of."""
        self._layers = dict(layers)
        self._predictor = predictor
        self._share_to_stream = share_to_stream
        self._places = _make_rings(layers)
        self._fits_all = all(ring.fits_all for ring, _ in self._places.values())
        self._loans: dict[int, _Loan] = {}

    def hint(self, layer_id: int, routing: Routing) -> None:
        """See `ExpertSource`. The demand comes at once, so only the predictor learns of it."""
        if self._predictor is not None:
            self._predictor.observe(layer_id, routing, None)

    def acquire(self, layer_id: int, demand: Tensor) -> Generator[BankView | ModuleView, None, None]:
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
        layer.cache.begin_turn()
        offsets = demand.tolist()
        wanted = [
            (layer_id, expert) for expert in range(layer.num_experts) if offsets[expert] < offsets[expert + 1]
        ]
        ring, place = self._places[layer_id]
        is_pass = len(wanted) >= self._share_to_stream * layer.num_experts
        if is_pass:
            ring.begin_group(place)
        else:
            ring.leave()
        left, pinned = dict.fromkeys(wanted), set[ExpertKey]()
        try:
            self._pin_present(layer.cache, wanted, pinned)
            while left:
                if self._start(layer.cache, left, pinned) and is_pass:
                    ring.read_ahead()
                ready = [key for key in left if key in pinned and layer.cache.is_ready(key)]
                if not ready:
                    self._wait(layer.cache, ring, [key for key in left if key in pinned])
                    continue
                if is_pass:
                    ready = _choose_in_pass(ring, ready, len(left), len(wanted))
                for key in ready:
                    del left[key]
                if not (left or is_pass):
                    self._read_guesses(layer_id)
                yield self._lend(layer, ready, pinned)
                if is_pass:
                    for key in ready:
                        ring.spend(key)
            if is_pass:
                ring.read_ahead()
        except SectionReadError:
            # What fails for the same reason shall not be met by the next who asks for it.
            layer.cache.settle(list(pinned))
            ring.leave()
            raise
        finally:
            for key in pinned:
                layer.cache.unpin(key)
            if is_pass:
                ring.end_group(place)

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """See `ExpertSource`. Raises `ShapeError` for a view that is not lent, or is no longer."""
        loan = self._loans.pop(id(view), None)
        if loan is None:
            raise ShapeError(
                f"layer {layer_id}: this view is not lent; release each view that was acquired once"
            )
        for key in loan.keys:
            loan.cache.unpin(key)

    def _pin_present(self, cache: SectionCache, wanted: Sequence[ExpertKey], pinned: set[ExpertKey]) -> None:
        """Counts the demand, and holds what of it is here or on its way."""
        for key in wanted:
            cache.demand(key)
            if cache.is_here(key):
                cache.pin(key)
                pinned.add(key)

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

    def _wait(self, cache: SectionCache, ring: Ring, keys: Sequence[ExpertKey]) -> None:
        """Waits for one of the keys, or for any slot; where nothing is on its way, what the ring holds must do."""
        if cache.wait_any(keys) or ring.leave():
            return
        raise ShapeError(
            f"all {cache.pool.num_slots} slots are held by {len(self._loans)} views that were not released; "
            "release each view before the next is needed, or have more slots"
        )

    def _read_guesses(self, layer_id: int) -> None:
        """Prefetches what the predictor guesses. All that is demanded has arrived, so that the disk would be idle."""
        if self._predictor is None or self._fits_all:
            return
        guesses = dict.fromkeys(self._predictor.guess(layer_id))
        for key in guesses:
            cache = self._layers[key[0]].cache
            if not cache.is_here(key) and not cache.prefetch(key, spared=guesses):
                return

    def _lend(self, layer: CachedLayer, keys: Sequence[ExpertKey], pinned: set[ExpertKey]) -> BankView:
        """Makes a view of experts that are ready; their pins go from ``pinned`` to the view."""
        slots = [-1] * layer.num_experts
        for key in keys:
            slots[key[1]] = layer.cache.use(key)
            self.uses[key] += 1
        view = layer.layout.make_view(layer.cache.pool.parts, torch.tensor(slots))
        self._loans[id(view)] = _Loan(view, layer.cache, tuple(keys))
        pinned.difference_update(keys)
        return view


def _make_rings(layers: Mapping[int, CachedLayer]) -> dict[int, tuple[Ring, int]]:
    """Returns for each layer the ring of its cache and the layer's place in it."""
    by_cache: dict[SectionCache, list[int]] = {}
    for layer_id in sorted(layers):
        by_cache.setdefault(layers[layer_id].cache, []).append(layer_id)
    places: dict[int, tuple[Ring, int]] = {}
    for cache, layer_ids in by_cache.items():
        ring = Ring(cache, [[(i, e) for e in range(layers[i].num_experts)] for i in layer_ids])
        places.update((layer_id, (ring, place)) for place, layer_id in enumerate(layer_ids))
    return places


def _choose_in_pass(
    ring: Ring, ready: Sequence[ExpertKey], num_left: int, num_wanted: int
) -> list[ExpertKey]:
    """Returns which of the experts that are ready to compute next: first those that make room for others, and of those
    that stay only some at a time, unless no room is needed."""
    passing = [key for key in ready if not ring.stays(key)]
    if len(ready) == num_left and not (passing and ring.is_short):
        return list(ready)
    return passing or list(ready[: max(1, num_wanted // _PARTS_OF_STAYING)])
