"""The rules of the policies in the plainest form: every loaded section is looked at to find a victim."""

from __future__ import annotations

from collections.abc import Hashable

from moesys.store import MayLeave


class SlowLeastFrequent:
    def __init__(self) -> None:
        self._counts: dict[Hashable, int] = {}
        self._loaded: dict[Hashable, None] = {}

    def record_load(self, key: Hashable) -> None:
        self._loaded[key] = None
        self._counts.setdefault(key, 0)

    def record_use(self, key: Hashable) -> None:
        self._counts[key] += 1

    def record_eviction(self, key: Hashable) -> None:
        del self._loaded[key]

    def choose_victim(self, may_leave: MayLeave) -> Hashable | None:
        return min(filter(may_leave, self._loaded), key=self._counts.__getitem__, default=None)


class SlowFadingCounts:
    """Adds up all uses anew for every question. Keys are (group, number)."""

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._uses: list[tuple[int, int]] = []
        self._loaded: dict[tuple[int, int], None] = {}

    def record_load(self, key: tuple[int, int]) -> None:
        self._loaded[key] = None

    def record_use(self, key: tuple[int, int]) -> None:
        self._uses.append(key)

    def record_eviction(self, key: tuple[int, int]) -> None:
        del self._loaded[key]

    def compute_count(self, key: tuple[int, int]) -> float:
        visits = 0
        total = 0.0
        for run in self._list_visits():
            visits += run[0][0] == key[0]
            total += 2 ** (visits / self._half_life) if key in run else 0
        return total

    def _list_visits(self) -> list[list[tuple[int, int]]]:
        runs: list[list[tuple[int, int]]] = []
        for use in self._uses:
            if not runs or runs[-1][0][0] != use[0] or use in runs[-1]:
                runs.append([])
            runs[-1].append(use)
        return runs

    def choose_victim(self, may_leave: MayLeave) -> Hashable | None:
        return min(filter(may_leave, self._loaded), key=self.compute_count, default=None)


class SlowHitCounts:
    def __init__(self, threshold: float, decay: float, period: int) -> None:
        self._threshold = threshold
        self._decay = decay
        self._period = period
        self._hits: dict[Hashable, float] = {}
        self._uses = 0

    def record_load(self, key: Hashable) -> None:
        self._hits[key] = 0.0

    def record_use(self, key: Hashable) -> None:
        self._hits[key] += 1.0
        self._uses += 1
        if self._uses % self._period == 0:
            self._hits = {key: hits * self._decay for key, hits in self._hits.items()}

    def record_eviction(self, key: Hashable) -> None:
        del self._hits[key]

    def choose_victim(self, may_leave: MayLeave) -> Hashable | None:
        keys = list(filter(may_leave, self._hits))
        proven = [key for key in keys if self._hits[key] >= self._threshold]
        return min(proven or keys, key=self._hits.__getitem__, default=None)
