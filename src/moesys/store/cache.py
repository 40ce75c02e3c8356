"""Sections in slots: what is there, what is on its way, what may not leave, and who makes room.

All bookkeeping happens in the caller's thread; only the bytes arrive from others. A section is loading, ready, or not
here; a pinned one is never evicted.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any
from dataclasses import dataclass

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
    """Prefetched sections that left before anybody used them."""


@dataclass
class _Entry:
    slot: int
    read: Read | None
    num_pins: int = 0
    was_used: bool = False


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
        self._free = list(reversed(range(pool.num_slots)))

    def is_ready(self, key: Hashable) -> bool:
        """Whether a section lies in its slot."""
        entry = self._entries.get(key)
        return entry is not None and entry.read is None

    def is_here(self, key: Hashable) -> bool:
        """Whether a section lies in its slot or is on its way there."""
        return key in self._entries

    def demand(self, key: Hashable) -> None:
        """Counts that a section is needed now, and makes a prefetch under way urgent; one that has already failed is
        forgotten, so that it is read anew."""
        entry = self._entries.get(key)
        if (
            entry is not None
            and entry.read is not None
            and entry.read.error is not None
            and not entry.num_pins
        ):
            self._reader.wait_any([entry.read])
            self.collect()
            entry = None
        if entry is not None and entry.read is None:
            self.stats.num_hits += 1
            return
        self.stats.num_misses += 1
        if entry is not None and entry.read is not None:
            self._reader.hurry(entry.read)

    def start(self, key: Hashable, urgency: Urgency) -> bool:
        """Starts to load a section that is not here; returns False when every slot is pinned or still being filled.

        A prefetch evicts as a demand does; whoever prefetches decides whether that is worth it.
        """
        slot = self._take_slot()
        if slot is None:
            return False
        section = self._sections[key]
        buffers = [
            self.pool.open_part(slot, extent.part, extent.part_offset, extent.num_bytes)
            for extent in section.extents
        ]
        self._entries[key] = _Entry(slot, self._reader.submit(section, buffers, urgency))
        self.stats.num_loads += 1
        self.stats.loaded_bytes += section.num_bytes
        return True

    def pin(self, key: Hashable) -> None:
        """Keeps a section that is here, or on its way, until it is unpinned as often."""
        self._entries[key].num_pins += 1

    def use(self, key: Hashable) -> int:
        """Returns the slot of a section that is ready, and counts its use."""
        entry = self._entries[key]
        assert entry.read is None
        if entry.was_used:
            self._policy.record_use(key)
        entry.was_used = True
        return entry.slot

    def unpin(self, key: Hashable) -> None:
        """Allows that a section leaves again. One whose read failed has left already."""
        entry = self._entries.get(key)
        if entry is not None:
            assert entry.num_pins > 0
            entry.num_pins -= 1

    def collect(self) -> None:
        """Takes note of the reads that are done.

        A failed one is forgotten, so that a later demand tries again; raises its `SectionReadError` when it was pinned,
        as somebody waits for it.
        """
        for key, entry in list(self._entries.items()):
            if entry.read is None or not entry.read.is_done:
                continue
            error = entry.read.error
            if error is not None:
                del self._entries[key]
                self._free.append(entry.slot)
                if entry.num_pins:
                    raise error
                continue
            entry.read = None
            self._policy.record_load(key)

    def wait_any(self, keys: Sequence[Hashable]) -> None:
        """Waits until one of these sections is ready, or, where none of them has a slot yet, until one may get one.

        Raises as `collect` does.
        """
        loading = {key: entry.read for key, entry in self._entries.items() if entry.read is not None}
        reads = [loading[key] for key in keys if key in loading] or list(loading.values())
        assert reads, "nothing is on its way"
        self._reader.wait_any(reads)
        self.collect()

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        self.collect()
        candidates = [
            key for key, entry in self._entries.items() if entry.read is None and entry.num_pins == 0
        ]
        if not candidates:
            return None
        victim = self._policy.choose_victim(candidates)
        self._policy.record_eviction(victim)
        entry = self._entries.pop(victim)
        self.stats.num_wasted += not entry.was_used
        return entry.slot
