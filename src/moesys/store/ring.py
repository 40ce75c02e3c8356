"""The order of a pass over everything, in slots that hold less than everything.

In such a pass, section after section is needed in a known order: layer after layer of a long prompt. What was just
computed is needed again last of all, so it is what leaves. Yet if everything left as soon as it was computed, every
pass would read everything. So most slots keep what they hold, evenly spread over the layers, and the other sections
pass through the few slots that are left, read ahead in order while what stays is computed: of N sections in K slots, R
of which are passed through, a pass after the first reads N - K + R.

What must not leave is pinned, so that the cache's policy, whichever it is, finds only what was computed. Works for
every number of slots from 1. Knows nothing of files or of what is computed.

What is read ahead is read only while nothing is demanded. At the end of a pass that followed one, the next one's first
sections are read ahead too. Nobody knows whether there will be one: after the last piece of a prompt single tokens
come. It is worth a try all the same, since a wrong one costs so little: it takes only the slots that sections pass
through, what leaves them was just computed beyond the share of its group, and a demand goes before all that still
waits.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate

from moesys.store.cache import SectionCache
from moesys.store.events import Urgency

_FEWEST_PASSING = 4
"""Slots to pass through: enough reads in flight while one section is computed."""


class Ring:
    """Passes over the groups of sections, such as layers, that share a cache.

    A pass is a series of `begin_group` and `end_group` in the order of the groups. Between passes nothing is pinned,
    nor after `leave`.
    """

    def __init__(self, cache: SectionCache, groups: Sequence[Sequence[Hashable]]) -> None:
        self._cache = cache
        self._groups = [list(group) for group in groups]
        self._order = [key for group in groups for key in group]
        self._ends = list(accumulate(map(len, groups)))
        self._group_of = {key: i for i, group in enumerate(groups) for key in group}
        self.num_passing = _count_passing(len(self._order), cache.pool.num_slots, len(groups))
        """Slots that sections pass through; 0 where everything fits."""
        self.fits_all = not self.num_passing
        self._quotas = self._share_out(min(len(self._order), cache.pool.num_slots - self.num_passing))
        self._staying: list[set[Hashable]] = [set() for _ in groups]
        self._pinned: set[Hashable] = set()
        self._group: int | None = None
        self._cursor = 0
        self._follows_pass = False
        self.is_short = False
        """Whether the last section to be read ahead found no slot."""

    def begin_group(self, index: int) -> None:
        """Says that the sections of a group are needed now, most of them. A group before the last one begins
        a new pass."""
        if self._group is None or index < self._group:
            self._begin_pass()
        self._group = index
        self._cursor = max(self._cursor, self._ends[index])

    def read_ahead(self) -> None:
        """Starts to read the sections of the groups to come that are not here, in order, while slots last, none of them
        before what is demanded; those of the next pass too where this one was not the first."""
        self.is_short = False
        if self._group is None:
            return
        start = self._ends[self._group] - len(self._groups[self._group])
        stop = len(self._order) + (start if self._follows_pass else 0)
        while self._cursor < stop:
            key = self._order[self._cursor % len(self._order)]
            if not self._cache.is_here(key):
                if not self._cache.start(key, Urgency.PREFETCH):
                    self.is_short = True
                    return
                self._pin(key)
            self._cursor += 1

    def stays(self, key: Hashable) -> bool:
        """Whether a section is to stay when it has been computed."""
        return key in self._staying[self._group_of[key]]

    def spend(self, key: Hashable) -> None:
        """Says that a section that is here has been computed. It stays if its group keeps less than its share, else it
        may leave."""
        index = self._group_of[key]
        staying = self._staying[index]
        if self._group is None or key in staying:
            return
        if len(staying) < self._quotas[index]:
            staying.add(key)
            self._pin(key)
        else:
            self._unpin(key)

    def end_group(self, index: int) -> None:
        """Says that a group is done; what of it nobody needed counts as computed. The last group ends the pass. Of a
        group that is not the present one, such as one given up before others began, nothing is left to end."""
        if self._group != index:
            return
        for key in self._groups[index]:
            if key in self._pinned:
                self.spend(key)
        if index == len(self._groups) - 1:
            self._release()
            self._follows_pass = True

    def leave(self) -> bool:
        """Says that what comes next has another order. Returns whether anything was held for a pass."""
        was_holding = bool(self._pinned)
        if self._group is not None:
            self._release()
        self._follows_pass = False
        return was_holding

    def _begin_pass(self) -> None:
        """Holds all that is here, but for as many slots as sections pass through: what leaves for them is beyond the
        share of its group, the farthest first."""
        self._release()
        self._cursor = 0
        here = [[key for key in group if self._cache.is_here(key)] for group in self._groups]
        for keys, quota, staying in zip(here, self._quotas, self._staying, strict=True):
            for key in keys:
                self._pin(key)
            staying.update(keys[:quota])
        num_free = self._cache.pool.num_slots - len(self._pinned)
        surplus = [key for key in self._order if key in self._pinned and not self.stays(key)]
        for key in surplus[max(0, len(surplus) - max(0, self.num_passing - num_free)) :]:
            self._unpin(key)

    def _share_out(self, num_staying: int) -> list[int]:
        """Returns how many sections of each group stay, in proportion to its size."""
        shares = [end * num_staying // len(self._order) for end in self._ends]
        return [share - before for before, share in zip([0, *shares], shares, strict=False)]

    def _release(self) -> None:
        for key in list(self._pinned):
            self._unpin(key)
        for staying in self._staying:
            staying.clear()
        self._group = None

    def _pin(self, key: Hashable) -> None:
        if key not in self._pinned:
            self._cache.pin(key)
            self._pinned.add(key)

    def _unpin(self, key: Hashable) -> None:
        if key in self._pinned:
            self._pinned.remove(key)
            self._cache.unpin(key)


def _count_passing(num_sections: int, num_slots: int, num_groups: int) -> int:
    """Returns how many slots sections pass through: a third of what a group lacks. Those of more would be read anew in
    each pass; fewer would leave the disk idle while something else than this group is computed."""
    if num_slots >= num_sections:
        return 0
    lacking = -(-(num_sections - num_slots) // num_groups)
    return min(num_slots, max(_FEWEST_PASSING, -(-lacking // 3)))
