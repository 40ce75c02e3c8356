"""Sections in slots: what is there, what is on its way, what may not leave, and who makes room.

All bookkeeping happens in the caller's thread; only the bytes arrive from others. A section is not here, loading,
ready, or failed; one that failed stays until the last who waits for it has heard of it. A pinned one is never evicted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Generic, TypeVar

from moesys.errors import SectionReadError, ShapeError
from moesys.store.events import Urgency, Verification
from moesys.store.policy import Policy
from moesys.store.section import Section
from moesys.store.tier import Arrival, Mover, Slots


@dataclass
class CacheStats:
    """Counts since the cache was made.

    ``loaded_bytes`` is ``used_bytes`` + ``wasted_bytes`` + what is on its way or waits for its first use.
    """

    num_hits: int = 0
    """Demanded sections that were there."""
    num_misses: int = 0
    """Demanded sections that were not there or still on their way."""
    num_loads: int = 0
    """Sections read, prefetched ones too."""
    loaded_bytes: int = 0
    used_bytes: int = 0
    """Of sections that were loaded and then used, once for each load."""
    num_wasted: int = 0
    """Sections that were read and left before anybody used them, those that failed included."""
    wasted_bytes: int = 0
    prefetch_issued: int = 0
    """Loads that began as a guess."""
    prefetch_used: int = 0
    """Of these, the ones that were used."""
    ahead_issued: int = 0
    """Loads that began before they were demanded since an order said so, such as that of a pass; no guesses."""
    ahead_used: int = 0
    """Of these, the ones that were used."""
    stall_s: float = 0.0
    """Seconds in which somebody waited for a section."""
    num_recorded: int = 0
    """Sections that were read well but had no known checksums: what they were read as holds from then on."""
    num_unverified: int = 0
    """Sections that were read without a look at checksums, since the reader does not verify."""


@dataclass(frozen=True)
class CacheMemory:
    """What the slots of a cache hold, in bytes of sections.

    slots_bytes:      memory of all slots, whatever they hold.
    ready_bytes:      sections that lie in their slots.
    in_flight_bytes:  sections on their way to them.
    resident_bytes:   sections that never leave; part of the two above.
    num_free:         slots that hold nothing.
    """

    slots_bytes: int
    ready_bytes: int
    in_flight_bytes: int
    resident_bytes: int
    num_free: int


class _Cause(Enum):
    """Why a section was loaded."""

    DEMAND = auto()
    ORDER = auto()
    GUESS = auto()


@dataclass
class _Entry:
    """A section that has a slot.

    arrival:    None once its bytes are there.
    last_turn:  in which it was used last; None before its first use.
    """

    slot: int
    num_bytes: int
    cause: _Cause
    arrival: Arrival | None
    num_pins: int = 0
    last_turn: int | None = None

    @property
    def error(self) -> SectionReadError | None:
        return self.arrival.error if self.arrival is not None and self.arrival.is_done else None


Pool = TypeVar("Pool", bound=Slots[Any])


class SectionCache(Generic[Pool]):
    """Keeps sections, by key, in the slots of a tier, and has those that are not there brought."""

    def __init__(
        self, pool: Pool, sections: Mapping[Any, Section], mover: Mover[Any, Any], policy: Policy
    ) -> None:
        """mover: fills the slots of ``pool``, such as a `SectionReader` those of a `SlotPool`."""
        self.pool = pool
        self.stats = CacheStats()
        self._sections = sections
        self._reader = mover
        self._policy = policy
        self._entries: dict[Hashable, _Entry] = {}
        self._loading: dict[Hashable, _Entry] = {}
        self._residents: set[Hashable] = set()
        self._free = list(reversed(range(pool.num_slots)))
        self._turn = 0

    @property
    def sections(self) -> Mapping[Any, Section]:
        """All that it could keep, by key."""
        return self._sections

    def describe(self) -> CacheMemory:
        """Returns what the slots hold now."""
        ready = [entry for entry in self._entries.values() if entry.arrival is None]
        return CacheMemory(
            self.pool.num_bytes,
            sum(entry.num_bytes for entry in ready),
            sum(entry.num_bytes for entry in self._loading.values()),
            sum(self._entries[key].num_bytes for key in self._residents),
            len(self._free),
        )

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
        return entry is not None and entry.arrival is None

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
        if entry is not None and entry.arrival is not None:
            self._reader.hurry(entry.arrival)

    def start(self, key: Hashable, urgency: Urgency = Urgency.DEMAND) -> bool:
        """Starts to load a section that is not here; returns False when every slot is pinned or still being filled.

        urgency: a prefetch is for what an order says comes later: it takes a slot like a demand, but is read only while
                 nothing is demanded.
        """
        if not self._free:
            self.collect()
        slot = self._free.pop() if self._free else self._evict(lambda entry: True)
        if slot is None:
            return False
        is_ahead = urgency is Urgency.PREFETCH
        self._load(key, slot, urgency, _Cause.ORDER if is_ahead else _Cause.DEMAND)
        self.stats.ahead_issued += is_ahead
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
        self._load(key, slot, Urgency.PREFETCH, _Cause.GUESS)
        self.stats.prefetch_issued += 1
        return True

    def pin(self, key: Hashable) -> None:
        """Keeps a section that is here, or on its way, until it is unpinned as often."""
        self._entries[key].num_pins += 1

    def use(self, key: Hashable) -> int:
        """Returns the slot of a section that is ready, and counts its use."""
        entry = self._entries[key]
        assert entry.arrival is None
        self._policy.record_use(key)
        if entry.last_turn is None:
            self.stats.used_bytes += entry.num_bytes
            self.stats.prefetch_used += entry.cause is _Cause.GUESS
            self.stats.ahead_used += entry.cause is _Cause.ORDER
        entry.last_turn = self._turn
        return entry.slot

    def unpin(self, key: Hashable) -> None:
        """Allows that a section leaves again. One whose read failed leaves with its last pin."""
        entry = self._entries[key]
        assert entry.num_pins > 0
        entry.num_pins -= 1
        if entry.error is not None and not entry.num_pins and key not in self._loading:
            self._forget_failed(key, entry)

    def pin_resident(self, keys: Iterable[Hashable]) -> None:
        """Loads sections that shall never leave, and waits for them. Those that are resident already stay so.

        Raises `ShapeError` when they leave no slot for the sections that are not among them, or where others hold the
        slots; and the `SectionReadError` of one that failed: none of these is resident then.
        """
        added = [key for key in dict.fromkeys(keys) if key not in self._residents]
        num_residents = len(self._residents) + len(added)
        most = self.pool.num_slots - (num_residents < len(self._sections))
        if num_residents > most:
            raise ShapeError(
                f"{num_residents} resident sections leave no slot of {self.pool.num_slots} for the other "
                f"{len(self._sections) - num_residents}; have at most {most}, or more slots"
            )
        pinned = []
        try:
            for key in added:
                while not self.is_here(key) and not self.start(key):
                    if not self.wait_any([]):
                        raise ShapeError(
                            f"all {self.pool.num_slots} slots are pinned, so that no section can become resident; "
                            "unpin them first"
                        )
                self.pin(key)
                pinned.append(key)
            for key in added:
                while not self.is_ready(key):
                    self.wait_any([key])
        except BaseException:
            for key in pinned:
                self.unpin(key)
            raise
        self._residents.update(added)

    def collect(self) -> None:
        """Takes note of the reads that are done. A failed one that nobody waits for is forgotten, so that a later
        demand tries again."""
        done = [
            (key, entry)
            for key, entry in self._loading.items()
            if entry.arrival is not None and entry.arrival.is_done
        ]
        for key, entry in done:
            del self._loading[key]
            if entry.error is None:
                self._count_verification(entry.arrival)
                entry.arrival = None
                self._policy.record_load(key)
            elif not entry.num_pins:
                self._forget_failed(key, entry)

    def wait_any(self, keys: Sequence[Hashable]) -> bool:
        """Waits until one of these sections is ready or, where none is on its way, any other, whose slot may be had
        then; returns False at once when nothing is on its way.

        Raises the `SectionReadError` of one of these sections that failed.
        """
        self._raise_failed(keys)
        reads = {key: entry.arrival for key, entry in self._loading.items() if entry.arrival is not None}
        if not reads:
            return False
        self._wait([reads[key] for key in keys if key in reads] or list(reads.values()))
        self._raise_failed(keys)
        self.collect()
        return True

    def settle(self, keys: Sequence[Hashable]) -> None:
        """Waits until none of these sections is on its way, whether it arrived or failed."""
        while reads := [entry.arrival for key in keys if (entry := self._loading.get(key)) and entry.arrival]:
            self._wait(reads)
            self.collect()

    def _wait(self, arrivals: Sequence[Arrival]) -> None:
        start = time.perf_counter()
        try:
            self._reader.wait_any(arrivals)
        finally:
            self.stats.stall_s += time.perf_counter() - start

    def _raise_failed(self, keys: Sequence[Hashable]) -> None:
        for key in keys:
            if key in self._entries and (error := self._entries[key].error) is not None:
                raise error

    def _load(self, key: Hashable, slot: int, urgency: Urgency, cause: _Cause) -> None:
        section = self._sections[key]
        places = [
            self.pool.open_part(slot, extent.part, extent.part_offset, extent.num_bytes)
            for extent in section.extents
        ]
        arrival = self._reader.submit(section, places, urgency)
        entry = _Entry(slot, section.num_bytes, cause, arrival)
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
        if entry.last_turn is None:
            self._count_waste(entry)
        return entry.slot

    def _forget_failed(self, key: Hashable, entry: _Entry) -> None:
        del self._entries[key]
        self._free.append(entry.slot)
        self._count_waste(entry)

    def _count_waste(self, entry: _Entry) -> None:
        self.stats.num_wasted += 1
        self.stats.wasted_bytes += entry.num_bytes

    def _count_verification(self, arrival: Arrival | None) -> None:
        assert arrival is not None
        self.stats.num_recorded += arrival.verification is Verification.RECORDED
        self.stats.num_unverified += arrival.verification is Verification.SKIPPED
