"""Which section leaves when a slot is needed: pure bookkeeping over names, without files or memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol


class Policy(Protocol):
    """Chooses victims. Told of every use and every load, in order."""

    def record_use(self, key: Hashable) -> None:
        """A section that was there was used."""
        ...

    def record_load(self, key: Hashable) -> None:
        """A section was brought in."""
        ...

    def record_eviction(self, key: Hashable) -> None:
        """A section was dropped."""
        ...

    def choose_victim(self, candidates: Iterable[Hashable]) -> Hashable:
        """Returns the one of the candidates (at least one, in order of loading) that should leave."""
        ...


class LeastRecent:
    """The section whose last use is longest ago (LRU)."""

    def __init__(self) -> None:
        self._clock = 0
        self._last_use: dict[Hashable, int] = {}

    def record_use(self, key: Hashable) -> None:
        """See `Policy`."""
        self._clock += 1
        self._last_use[key] = self._clock

    def record_load(self, key: Hashable) -> None:
        """See `Policy`."""
        self.record_use(key)

    def record_eviction(self, key: Hashable) -> None:
        """See `Policy`."""
        del self._last_use[key]

    def choose_victim(self, candidates: Iterable[Hashable]) -> Hashable:
        """See `Policy`."""
        return min(candidates, key=self._last_use.__getitem__)


class LeastFrequent:
    """The section that was used least often ever (LFU); among equals the oldest. Counts outlive an eviction."""

    def __init__(self) -> None:
        self._counts: dict[Hashable, int] = {}

    def record_use(self, key: Hashable) -> None:
        """See `Policy`."""
        self._counts[key] = self._counts.get(key, 0) + 1

    def record_load(self, key: Hashable) -> None:
        """See `Policy`."""
        self.record_use(key)

    def record_eviction(self, key: Hashable) -> None:
        """See `Policy`. What is known of the section stays known."""

    def choose_victim(self, candidates: Iterable[Hashable]) -> Hashable:
        """See `Policy`."""
        return min(candidates, key=self._counts.__getitem__)


class HitCounts:
    """MoESys' cache rule (arXiv 2205.10034, algorithm 2): hits since loading, decayed over time.

    A loaded section has one hit. The victim has the fewest hits of those with at least ``threshold``, so that what has
    just come is not thrown out at once; where none has so many, it has the fewest of all. Among equals the oldest.
    After every ``period`` uses all hits are multiplied by ``decay``.
    """

    def __init__(self, threshold: float = 2.0, decay: float = 0.5, period: int = 512) -> None:
        self._threshold = threshold
        self._decay = decay
        self._period = period
        self._hits: dict[Hashable, float] = {}
        self._uses = 0

    def record_use(self, key: Hashable) -> None:
        """See `Policy`."""
        self._hits[key] += 1.0
        self._count_use()

    def record_load(self, key: Hashable) -> None:
        """See `Policy`."""
        self._hits[key] = 1.0
        self._count_use()

    def record_eviction(self, key: Hashable) -> None:
        """See `Policy`."""
        del self._hits[key]

    def choose_victim(self, candidates: Iterable[Hashable]) -> Hashable:
        """See `Policy`."""
        keys = list(candidates)
        proven = [key for key in keys if self._hits[key] >= self._threshold]
        return min(proven or keys, key=self._hits.__getitem__)

    def _count_use(self) -> None:
        self._uses += 1
        if self._uses % self._period == 0:
            self._hits = {key: hits * self._decay for key, hits in self._hits.items()}
