"""Which section leaves when a slot is needed: pure bookkeeping over names, without files or memory.

Finding a victim takes logarithmic time in the number of sections: a cache holds thousands of experts and asks for every
miss.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from enum import StrEnum
from itertools import count
from typing import Protocol

from moesys.store.usage import UsageProfile

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

    usage: counts to start from.
    """

    def __init__(self, usage: UsageProfile | None = None) -> None:
        self._counts = dict[Hashable, float](() if usage is None else usage.counts.items())
        self._loaded: dict[Hashable, int] = {}
        self._numbers = count()
        self._by_count = _Ranking(self._rank)

    def record_load(self, key: Hashable) -> None:
        """See `Policy`."""
        self._loaded[key] = next(self._numbers)
        self._counts.setdefault(key, 0)
        self._by_count.add(key)

    def record_use(self, key: Hashable) -> None:
        """See `Policy`."""
        self._counts[key] += 1

    def record_eviction(self, key: Hashable) -> None:
        """See `Policy`. What is known of the section stays known."""
        del self._loaded[key]

    def choose_victim(self, may_leave: MayLeave) -> Hashable | None:
        """See `Policy`."""
        return self._by_count.find_first(may_leave)

    def _rank(self, key: Hashable) -> _Rank | None:
        number = self._loaded.get(key)
        return None if number is None else (self._counts[key], number)


class HitCounts:
    """MoESys' cache rule (arXiv 2205.10034, algorithm 2): hits since loading, decayed over time.

    The use for which a section was loaded is its first hit. The victim has the fewest hits of those with at least
    ``threshold``, so that what has just come is not thrown out at once; where none has so many, it has the fewest of
    all. Among equals the one loaded first. After every ``period`` uses all hits are multiplied by ``decay``.
    """

    def __init__(self, threshold: float = 2.0, decay: float = 0.5, period: int = 512) -> None:
        self._threshold = threshold
        self._decay = decay
        self._period = period
        self._hits: dict[Hashable, float] = {}
        self._loaded: dict[Hashable, int] = {}
        self._numbers = count()
        self._uses = 0
        self._proven = _Ranking(self._rank_proven)
        self._new = _Ranking(self._rank_new)

    def record_load(self, key: Hashable) -> None:
        """See `Policy`."""
        self._hits[key] = 0.0
        self._loaded[key] = next(self._numbers)
        (self._proven if self._is_proven(key) else self._new).add(key)

    def record_use(self, key: Hashable) -> None:
        """See `Policy`."""
        was_proven = self._is_proven(key)
        self._hits[key] += 1.0
        if self._is_proven(key) and not was_proven:
            self._proven.add(key)
        self._uses += 1
        if self._uses % self._period == 0:
            self._hits = {key: hits * self._decay for key, hits in self._hits.items()}
            self._proven.rebuild(filter(self._is_proven, self._hits))
            self._new.rebuild(key for key in self._hits if not self._is_proven(key))

    def record_eviction(self, key: Hashable) -> None:
        """See `Policy`."""
        del self._hits[key], self._loaded[key]

    def choose_victim(self, may_leave: MayLeave) -> Hashable | None:
        """See `Policy`."""
        victim = self._proven.find_first(may_leave)
        return self._new.find_first(may_leave) if victim is None else victim

    def _is_proven(self, key: Hashable) -> bool:
        return self._hits[key] >= self._threshold

    def _rank_proven(self, key: Hashable) -> _Rank | None:
        is_there = key in self._hits and self._is_proven(key)
        return (self._hits[key], self._loaded[key]) if is_there else None

    def _rank_new(self, key: Hashable) -> _Rank | None:
        is_there = key in self._hits and not self._is_proven(key)
        return (self._hits[key], self._loaded[key]) if is_there else None


class FadingCounts:
    """The section with the fewest uses, of which older ones count less (LRFU: Lee et al., IEEE Transactions on
    Computers 50-12, 2001); among equals the one loaded first. Counts outlive an eviction.

    Time is counted in visits: the sections of a group, such as a layer, are used together, each once, and those of
    other groups before they are used again. So sections of a layer that waits for its turn do not look old.

    half_life:  after how many visits of its group a use counts half. The extremes are LRU and LFU; from 8 to 64 the
                loads of replayed routing differed by 6 % at most.
    usage:      counts to start from, as if they had been made for ever, those of the most used section in every visit.
    """

    def __init__(self, half_life: float = 24.0, usage: UsageProfile | None = None) -> None:
        self._half_life = half_life
        self._visits: Counter[Hashable] = Counter()
        self._visited: Hashable = None
        self._used_in_visit: set[Hashable] = set()
        self._loaded: dict[Hashable, int] = {}
        self._numbers = count()
        self._ranking = _Ranking(self._rank)
        # A use at time t, in half-lives, counts 2**(t - now) for ever after. What is kept of a section is the logarithm
        # of the sum of 2**t over its uses: it orders sections at any time, and only uses change it.
        self._logarithms: dict[Hashable, float] = {}
        if usage is not None and (most := max(usage.counts.values(), default=0)):
            scale = half_life / (math.log(2) * most)
            self._logarithms.update(
                (key, math.log2(scale * number)) for key, number in usage.counts.items() if number
            )

    def record_load(self, key: Hashable) -> None:
        """See `Policy`."""
        self._loaded[key] = next(self._numbers)
        self._logarithms.setdefault(key, -math.inf)
        self._ranking.add(key)

    def record_use(self, key: Hashable) -> None:
        """See `Policy`. The first number of a key, where it is several, names its group."""
        group = key[0] if isinstance(key, tuple) else None
        if group != self._visited or key in self._used_in_visit:
            self._visited = group
            self._visits[group] += 1
            self._used_in_visit.clear()
        self._used_in_visit.add(key)
        before, now = self._logarithms[key], self._visits[group] / self._half_life
        self._logarithms[key] = max(before, now) + math.log2(1 + 2 ** -abs(now - before))

    def record_eviction(self, key: Hashable) -> None:
        """See `Policy`. What is known of the section stays known."""
        del self._loaded[key]

    def choose_victim(self, may_leave: MayLeave) -> Hashable | None:
        """See `Policy`."""
        return self._ranking.find_first(may_leave)

    def _rank(self, key: Hashable) -> _Rank | None:
        number = self._loaded.get(key)
        return None if number is None else (self._logarithms[key], number)


class PolicyName(StrEnum):
    """The policies that `make_policy` makes."""

    LRU = "lru"
    """`LeastRecent`."""
    LFU = "lfu"
    """`LeastFrequent`."""
    MOESYS = "moesys"
    """`HitCounts`."""
    LRFU = "lrfu"
    """`FadingCounts`: the fewest loads in replays of recorded routing."""


def make_policy(name: PolicyName, usage: UsageProfile | None = None) -> Policy:
    """Makes a policy by its name.

    usage: what is known of the sections from runs before: policies whose counts outlive an eviction count on from it.
           `preload` lets every policy begin with the sections that were used most.
    """
    match name:
        case PolicyName.LRU:
            return LeastRecent()
        case PolicyName.LFU:
            return LeastFrequent(usage)
        case PolicyName.MOESYS:
            return HitCounts()
        case PolicyName.LRFU:
            return FadingCounts(usage=usage)


_Rank = tuple[float, int]
"""Score, and when it was loaded: unique, so that keys are never compared."""


class _Ranking:
    """Keys by rank, lowest first. A key's rank may only rise; that is looked at when the key comes first.

    rank: of a key now; None for one that is no longer part of the ranking.
    """

    def __init__(self, rank: Callable[[Hashable], _Rank | None]) -> None:
        self._rank = rank
        self._heap: list[tuple[_Rank, Hashable]] = []

    def add(self, key: Hashable) -> None:
        """Adds a key that has a rank."""
        rank = self._rank(key)
        assert rank is not None
        heapq.heappush(self._heap, (rank, key))

    def rebuild(self, keys: Iterable[Hashable]) -> None:
        """Starts anew from these keys, whose ranks may have fallen."""
        self._heap = [(rank, key) for key in keys if (rank := self._rank(key)) is not None]
        heapq.heapify(self._heap)

    def find_first(self, is_wanted: MayLeave) -> Hashable | None:
        """Returns the wanted key of the lowest rank."""
        refused: list[tuple[_Rank, Hashable]] = []
        found = None
        while self._heap and found is None:
            noted, key = self._heap[0]
            rank = self._rank(key)
            if rank is None:
                heapq.heappop(self._heap)
            elif rank != noted:
                heapq.heapreplace(self._heap, (rank, key))
            elif is_wanted(key):
                found = key
            else:
                refused.append(heapq.heappop(self._heap))
        for entry in refused:
            heapq.heappush(self._heap, entry)
        return found
