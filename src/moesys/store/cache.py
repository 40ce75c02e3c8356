"""Sections in slots: what is there, what is on its way, what may not leave, and who makes room.

All bookkeeping happens in the caller's thread; only the bytes arrive from others. A section is not here, loading,
ready, or failed; one that failed stays until the last who waits for it has heard of it. A pinned one is never evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesys.errors import SectionReadError
from moesys.store.policy import Policy
from moesys.store.reader import Read, SectionReader, Urgency
from moesys.store.section import Section
from moesys.store.slots import SlotPool


@dataclass
class CacheStats:
    """Counts since the cache was made."""

    num_hits: int = 0
    """Demanded sections that were there."""
    num_misses: int = 0
    """Demanded sections that were not there or still on their way."""
    num_loads: int = 0
    """Sections read, prefetched ones too."""
    loaded_bytes: int = 0
    num_wasted: int = 0
    """Sections that were read and left before anybody used them, those that failed included."""


@dataclass
class _Entry:
    """A section that has a slot.

    read:       None once its bytes are there.
    last_turn:  in which it was used last; None before its first use.
    """

    slot: int
    read: Read | None
    num_pins: int = 0
    last_turn: int | None = None

    @property
    def error(self) -> SectionReadError | None:
        return self.read.error if self.read is not None and self.read.is_done else None


class SectionCache:
    """Keeps sections, by key, in the slots of a pool, and reads those that are not there."""

    def __init__(
        self, pool: SlotPool, sections: Mapping[Any, Section], reader: SectionReader, policy: Policy
    ) -> None:
        self.pool = pool
        self.stats = CacheStats()
        self._sections = sections
        self._reader = reader
        self._policy = policy
        self._entries: dict[Hashable, _Entry] = {}
        self._loading: dict[Hashable, _Entry] = {}
        self._free = list(reversed(range(pool.num_slots)))
        self._turn = 0

    def begin_turn(self) -> None:
        """Says that a group of demands begins, such as those of a layer, and takes note of reads that are done.

        Turns tell `prefetch` what was used lately. Raises `SectionReadError` when the reader was closed.
        """
        self._reader.require_open()
        self._turn += 1
        self.collect()

    def is_ready(self, key: Hashable) -> bool:
        """Whether a section lies in its slot."""
        entry = self._entries.get(key)
        return entry is not None and entry.read is None

    def is_here(self, key: Hashable) -> bool:
        """Whether a section lies in its slot or is on its way there."""
        return key in self._entries

    def demand(self, key: Hashable) -> None:
        """Counts that a section is needed now, and makes a prefetch under way urgent."""
        if self.is_ready(key):
            self.stats.num_hits += 1
            return
        self.stats.num_misses += 1
        entry = self._loading.get(key)
        if entry is not None and entry.read is not None:
            self._reader.hurry(entry.read)

    def start(self, key: Hashable) -> bool:
        """Starts to load a section that is not here; returns False when every slot is pinned or still being filled."""
        if not self._free:
            self.collect()
        slot = self._free.pop() if self._free else self._evict(lambda entry: True)
        if slot is None:
            return False
        self._load(key, slot, Urgency.DEMAND)
        return True

    def prefetch(self, key: Hashable, spared: Container[Hashable] = ()) -> bool:
        """Starts to load a section that is not here and may be needed; returns False when no slot is to be had for a
        guess: one that is free, or holds what neither this turn nor the last one used.

        spared: sections that must not leave for it, such as those that are guessed too. One that waits for its first
                use never does.
        """

        def is_stale(entry: _Entry) -> bool:
            return entry.last_turn is not None and entry.last_turn < self._turn - 1

        slot = self._free.pop() if self._free else self._evict(is_stale, spared)
        if slot is None:
            return False
        self._load(key, slot, Urgency.PREFETCH)
        return True

    def pin(self, key: Hashable) -> None:
        """Keeps a section that is here, or on its way, until it is unpinned as often."""
        self._entries[key].num_pins += 1

    def use(self, key: Hashable) -> int:
        """Returns the slot of a section that is ready, and counts its use."""
        entry = self._entries[key]
        assert entry.read is None
        self._policy.record_use(key)
        entry.last_turn = self._turn
        return entry.slot

    def unpin(self, key: Hashable) -> None:
        """Allows that a section leaves again. One whose read failed leaves with its last pin."""
        entry = self._entries[key]
        assert entry.num_pins > 0
        entry.num_pins -= 1
        if entry.error is not None and not entry.num_pins and key not in self._loading:
            self._forget_failed(key, entry)

    def collect(self) -> None:
        """Takes note of the reads that are done. A failed one that nobody waits for is forgotten, so that a later
        demand tries again."""
        done = [
            (key, entry)
            for key, entry in self._loading.items()
            if entry.read is not None and entry.read.is_done
        ]
        for key, entry in done:
            del self._loading[key]
            if entry.error is None:
                entry.read = None
                self._policy.record_load(key)
            elif not entry.num_pins:
                self._forget_failed(key, entry)

    def wait_any(self, keys: Sequence[Hashable]) -> bool:
        """Waits until one of these sections is ready or, where none is on its way, any other, whose slot may be had
        then; returns False at once when nothing is on its way.

        Raises the `SectionReadError` of one of these sections that failed.
        """
        self._raise_failed(keys)
        reads = {key: entry.read for key, entry in self._loading.items() if entry.read is not None}
        if not reads:
            return False
        self._reader.wait_any([reads[key] for key in keys if key in reads] or list(reads.values()))
        self.collect()
        self._raise_failed(keys)
        return True

    def settle(self, keys: Sequence[Hashable]) -> None:
        """Waits until none of these sections is on its way, whether it arrived or failed."""
        while reads := [entry.read for key in keys if (entry := self._loading.get(key)) and entry.read]:
            self._reader.wait_any(reads)
            self.collect()

    def _raise_failed(self, keys: Sequence[Hashable]) -> None:
        for key in keys:
            if key in self._entries and (error := self._entries[key].error) is not None:
                raise error

    def _load(self, key: Hashable, slot: int, urgency: Urgency) -> None:
        section = self._sections[key]
        buffers = [
            self.pool.open_part(slot, extent.part, extent.part_offset, extent.num_bytes)
            for extent in section.extents
        ]
        entry = _Entry(slot, self._reader.submit(section, buffers, urgency))
        self._entries[key] = self._loading[key] = entry
        self.stats.num_loads += 1
        self.stats.loaded_bytes += section.num_bytes

    def _evict(self, may_leave: Callable[[_Entry], bool], spared: Container[Hashable] = ()) -> int | None:
        """Frees the slot of a section that is ready and not pinned, and returns it; None where there is none."""

        def is_candidate(key: Hashable) -> bool:
            entry = self._entries[key]
            return not entry.num_pins and may_leave(entry) and key not in spared

        victim = self._policy.choose_victim(is_candidate)
        if victim is None:
            return None
        self._policy.record_eviction(victim)
        entry = self._entries.pop(victim)
        self.stats.num_wasted += entry.last_turn is None
        return entry.slot

    def _forget_failed(self, key: Hashable, entry: _Entry) -> None:
        del self._entries[key]
        self._free.append(entry.slot)
        self.stats.num_wasted += 1
