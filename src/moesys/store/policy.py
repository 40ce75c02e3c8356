"""Which section leaves when a slot is needed: pure bookkeeping over names, without files or memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

MayLeave = Callable[[Hashable], bool]
"""Whether a section could give up its slot now."""


class Policy(Protocol):
    """Chooses victims among the sections that were loaded. Told of every load, then of every use, in order."""

    def record_load(self, key: Hashable) -> None:
        """A section was brought in; whether anybody will use it is not known yet."""
        ...

    def record_use(self, key: Hashable) -> None:
        """A section that is there was used."""
        ...

    def record_eviction(self, key: Hashable) -> None:
        """A section was dropped."""
        ...

    def choose_victim(self, may_leave: MayLeave) -> Hashable | None:
        """Returns the loaded section that should leave; None when none may."""
        ...


class LeastRecent:
    """The section whose last use, or load, is longest ago (LRU). Costs no more for many sections than for few."""

    def __init__(self) -> None:
        self._by_age: OrderedDict[Hashable, None] = OrderedDict()

    def record_load(self, key: Hashable) -> None:
        """See `Policy`."""
        self._by_age[key] = None

    def record_use(self, key: Hashable) -> None:
        """See `Policy`."""
        self._by_age.move_to_end(key)

    def record_eviction(self, key: Hashable) -> None:
        """See `Policy`."""
        del self._by_age[key]

    def choose_victim(self, may_leave: MayLeave) -> Hashable | None:
        """See `Policy`."""
        return next(filter(may_leave, self._by_age), None)


class LeastFrequent:
    """The section that was used least often ever (LFU); among equals the one loaded first. Counts outlive an eviction.

    Looks at every loaded section to choose one.
    """

    def __init__(self) -> None:
        self._counts: dict[Hashable, int] = {}
        self._loaded: dict[Hashable, None] = {}

    def record_load(self, key: Hashable) -> None:
        """See `Policy`."""
        self._loaded[key] = None
        self._counts.setdefault(key, 0)

    def record_use(self, key: Hashable) -> None:
        """See `Policy`."""
        self._counts[key] += 1

    def record_eviction(self, key: Hashable) -> None:
        """See `Policy`. What is known of the section stays known."""
        del self._loaded[key]

    def choose_victim(self, may_leave: MayLeave) -> Hashable | None:
        """See `Policy`."""
        return min(filter(may_leave, self._loaded), key=self._counts.__getitem__, default=None)


class HitCounts:
    """MoESys' cache rule (arXiv 2205.10034, algorithm 2): hits since loading, decayed over time.

    The use for which a section was loaded is its first hit. The victim has the fewest hits of those with at least
    ``threshold``, so that what has just come is not thrown out at once; where none has so many, it has the fewest of
    all. Among equals the one loaded first. After every ``period`` uses all hits are multiplied by ``decay``.

    Looks at every loaded section to choose one.
    """

    def __init__(self, threshold: float = 2.0, decay: float = 0.5, period: int = 512) -> None:
        self._threshold = threshold
        self._decay = decay
        self._period = period
        self._hits: dict[Hashable, float] = {}
        self._uses = 0

    def record_load(self, key: Hashable) -> None:
        """See `Policy`."""
        self._hits[key] = 0.0

    def record_use(self, key: Hashable) -> None:
        """See `Policy`."""
        self._hits[key] += 1.0
        self._uses += 1
        if self._uses % self._period == 0:
            self._hits = {key: hits * self._decay for key, hits in self._hits.items()}

    def record_eviction(self, key: Hashable) -> None:
        """See `Policy`."""
        del self._hits[key]

    def choose_victim(self, may_leave: MayLeave) -> Hashable | None:
        """See `Policy`."""
        keys = list(filter(may_leave, self._hits))
        proven = [key for key in keys if self._hits[key] >= self._threshold]
        return min(proven or keys, key=self._hits.__getitem__, default=None)
