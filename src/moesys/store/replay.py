"""What a cache of any size would have read, from the demands that were recorded: for any policy, and at best.

Pure bookkeeping over names. A demand is a group of sections that somebody needs at once, as a layer needs its experts.
Those that are there are held until they were used; the others are loaded into slots whose sections are not held. Where
a group is larger than the cache it passes in turns. Whatever the policy, a group costs as many loads as it has
sections that are not there when it comes: policies differ in what they leave for later groups.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from moesys.errors import ShapeError
from moesys.store.policy import Policy


class _Return(NamedTuple):
    """When a section is needed again.

    group:  the number of the group that needs it.
    rank:   among those that this group needs, see `_rank_returns`.
    """

    group: int
    rank: int


@dataclass(frozen=True)
class ReplayResult:
    """Counts of one replay.

    num_demands:  sections that were needed, once per group that needed them.
    num_loads:    of them, those that were not there.
    num_first:    of these, those that had never been there before: no policy saves them.
    """

    num_slots: int
    num_demands: int
    num_loads: int
    num_first: int

    @property
    def hit_rate(self) -> float:
        """Share of the demands that found their section there; 0 without demands."""
        return 1 - self.num_loads / self.num_demands if self.num_demands else 0.0

    def count_bytes(self, section_bytes: int) -> int:
        """Returns the bytes read, for sections of this size."""
        return self.num_loads * section_bytes


def replay(
    demands: Iterable[Collection[Hashable]],
    policy: Policy,
    num_slots: int,
    *,
    pinned: Sequence[Hashable] = (),
) -> ReplayResult:
    """Replays demands against a fresh policy, asking it as `SectionCache` does.

    demands:  groups of sections, in the order of time; each names a section once.
    pinned:   sections that are there from the beginning, loaded once, and never leave.

    Raises `ShapeError` for no slots, or none beside the pinned sections.
    """
    slots = ReplayedSlots(policy, num_slots, pinned)
    for group in demands:
        slots.serve(group)
    return slots.result


def replay_best(demands: Iterable[Collection[Hashable]], num_slots: int) -> ReplayResult:
    """Returns the fewest loads that any policy could have had, one that knows all demands beforehand included.

    That is Belady's rule (IBM Systems Journal 5-2, 1966): what is needed again last, or never, leaves. With groups it
    stays exact: of all that is there or needed now, a group leaves behind what is needed again soonest, as far as it
    may. A group that fits stays there as a whole. Of a larger one, the section that was loaded last cannot have left;
    so among those that one later group needs again, the better ones to keep are those of which that group can do
    without: `_rank_returns`. Takes O(n log n) for n demands. Raises `ShapeError` for no slots.
    """
    _require_slots(num_slots, 0)
    groups = [list(group) for group in demands]
    returns = _rank_returns(groups)
    here: dict[Hashable, _Return] = {}
    by_return: list[tuple[_Return, int, Hashable]] = []
    seen: set[Hashable] = set()
    num_loads = 0
    numbers = count()
    for group, returned in zip(groups, returns, strict=True):
        missing = [key for key in group if key not in here]
        num_loads += len(missing)
        seen.update(missing)
        here.update(returned)
        for key in group:
            heapq.heappush(by_return, (_negate(returned[key]), next(numbers), key))
        held = group if len(group) <= num_slots else [min(missing, key=returned.__getitem__)]
        _drop_farthest(here, by_return, num_slots, frozenset(held))
    return ReplayResult(num_slots, sum(map(len, groups)), num_loads, len(seen))


def _require_slots(num_slots: int, num_pinned: int) -> None:
    if num_slots <= num_pinned or num_slots < 1:
        raise ShapeError(
            f"a replay needs at least 1 slot beside {num_pinned} pinned sections, got {num_slots} in all; have more "
            "slots"
        )


def _rank_returns(groups: Sequence[Sequence[Hashable]]) -> list[dict[Hashable, _Return]]:
    """Returns for each group how soon each of its sections returns: the lower, the better to keep it.

    First counts the group that needs it next. Among those of one group comes first what returns latest after that:
    where this group is larger than the cache, what it finds there is what it cannot leave behind as its last.
    """
    latest: dict[Hashable, tuple[int, int]] = {}
    returns: list[dict[Hashable, _Return]] = []
    for now in range(len(groups) - 1, -1, -1):
        found = {key: _Return(*latest.get(key, (len(groups), 0))) for key in groups[now]}
        order = sorted(groups[now], key=found.__getitem__)
        latest.update((key, (now, -rank)) for rank, key in enumerate(order))
        returns.append(found)
    return returns[::-1]


def _drop_farthest(
    here: dict[Hashable, _Return],
    by_return: list[tuple[_Return, int, Hashable]],
    num_slots: int,
    held: Container[Hashable],
) -> None:
    """Drops what returns last until the slots suffice. by_return: a heap, outdated entries among it."""
    set_aside = []
    while len(here) > num_slots:
        entry = heapq.heappop(by_return)
        returned, _, key = entry
        if key not in here or here[key] != _negate(returned):
            continue
        if key in held:
            set_aside.append(entry)
        else:
            del here[key]
    for entry in set_aside:
        heapq.heappush(by_return, entry)


def _negate(returned: _Return) -> _Return:
    return _Return(-returned.group, -returned.rank)


class ReplayedSlots:
    """Which sections are there while a policy decides who leaves."""

    def __init__(self, policy: Policy, num_slots: int, pinned: Sequence[Hashable] = ()) -> None:
        """See `replay`."""
        _require_slots(num_slots, len(pinned))
        self._policy = policy
        self._num_slots = num_slots
        self._pinned = frozenset(pinned)
        self._here: set[Hashable] = set()
        self._seen: set[Hashable] = set()
        self._num_loads = 0
        self._num_demands = 0
        for key in pinned:
            self._load(key)
            policy.record_load(key)

    @property
    def result(self) -> ReplayResult:
        """The counts so far."""
        return ReplayResult(self._num_slots, self._num_demands, self._num_loads, len(self._seen))

    def is_here(self, key: Hashable) -> bool:
        """Whether a section lies in a slot now."""
        return key in self._here

    def serve(self, group: Collection[Hashable]) -> None:
        """Brings in and uses all sections of a group: those that are there, then the others as slots allow."""
        self._num_demands += len(group)
        ready = [key for key in group if key in self._here]
        missing = [key for key in group if key not in self._here]
        held = set(ready)
        while ready or missing:
            loading = []
            while missing and self._make_room(held):
                key = missing.pop(0)
                self._load(key)
                loading.append(key)
                held.add(key)
            for key in ready:
                self._policy.record_use(key)
            for key in loading:
                self._policy.record_load(key)
            for key in loading:
                self._policy.record_use(key)
            ready = []
            held.clear()

    def _make_room(self, held: Container[Hashable]) -> bool:
        """Returns whether a slot is free, or the policy gives up one that is not held."""
        if len(self._here) < self._num_slots:
            return True
        victim = self._policy.choose_victim(lambda key: key not in held and key not in self._pinned)
        if victim is None:
            return False
        self._policy.record_eviction(victim)
        self._here.remove(victim)
        return True

    def _load(self, key: Hashable) -> None:
        self._here.add(key)
        self._seen.add(key)
        self._num_loads += 1
