"""A cache under any order of events, beside a plain table of what must be true: bytes, pins, loads and waste."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from section_files import PART_BYTES, make_pool, read_expected, write_sections

from moesys.errors import SectionReadError, ShapeError
from moesys.store import LeastRecent, SectionCache, SectionReader
from moesys.store.cache import CacheMemory

NUM_SLOTS, NUM_KEYS = 3, 6
SECTION = sum(PART_BYTES)
WAIT_S = 10
KEYS = st.integers(0, NUM_KEYS - 1)


class Permits:
    """A read function whose every call waits until the section it belongs to may arrive, or must fail."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._verdicts: dict[int, bool] = {}

    def decide(self, key: int, arrives: bool) -> None:
        with self._changed:
            self._verdicts[key] = arrives
            self._changed.notify_all()

    def forget(self, key: int) -> None:
        with self._changed:
            self._verdicts.pop(key, None)

    def read_at(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        first, second = PART_BYTES
        half = len(self.data) // (first + second) * first
        key = offset // first if offset < half else (offset - half) // second
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._verdicts, WAIT_S)
            arrives = self._verdicts[key]
        if not arrives:
            raise OSError(5, "Input/output error")
        return os.preadv(descriptor, buffers, offset)

    data = b""


@dataclass
class Shadow:
    """What must be true of a section that is here."""

    is_ready: bool = False
    has_failed: bool = False
    num_pins: int = 0
    last_turn: int | None = None
    is_guess: bool = False


class CacheMachine(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "weights.bin"
        sections = write_sections(self.path)
        self.expected = [read_expected(self.path, key) for key in range(NUM_KEYS)]
        self.permits = Permits()
        self.permits.data = self.path.read_bytes()
        self.reader = SectionReader(3 * NUM_SLOTS, read_at=self.permits.read_at)
        self.cache = SectionCache(make_pool(NUM_SLOTS), sections, self.reader, LeastRecent())
        self.here: dict[int, Shadow] = {}
        self.residents: set[int] = set()
        self.turn = self.num_loads = self.num_wasted = self.num_demands = 0
        self.num_used = self.num_guesses = self.num_used_guesses = self.num_recorded = 0
        self.recorded: set[int] = set()
        self.is_closed = False

    def teardown(self) -> None:
        for key in range(NUM_KEYS):
            self.permits.decide(key, True)
        self.reader.close()
        self.folder.cleanup()

    def list_victims(self, *, is_guess: bool, spared: set[int]) -> set[int]:
        return {
            key
            for key, shadow in self.here.items()
            if shadow.is_ready
            and key not in self.residents
            and not shadow.num_pins
            and key not in spared
            and (not is_guess or (shadow.last_turn is not None and shadow.last_turn < self.turn - 1))
        }

    def load(self, key: int, *, is_guess: bool, spared: set[int]) -> None:
        self.permits.forget(key)
        has_free = len(self.here) < NUM_SLOTS
        victims = self.list_victims(is_guess=is_guess, spared=spared)
        found = self.cache.prefetch(key, spared) if is_guess else self.cache.start(key)
        assert found == (has_free or bool(victims))
        if not found:
            return
        gone = {old for old in self.here if not self.cache.is_here(old)}
        assert gone <= victims
        assert len(gone) == (not has_free)
        for old in gone:
            self.num_wasted += self.here.pop(old).last_turn is None
        self.here[key] = Shadow(is_guess=is_guess)
        self.num_loads += 1
        self.num_guesses += is_guess

    def arrive(self, key: int) -> None:
        self.here[key].is_ready = True
        self.num_recorded += key not in self.recorded
        self.recorded.add(key)

    def drop_failed(self, key: int) -> None:
        shadow = self.here[key]
        if shadow.has_failed and not shadow.num_pins:
            del self.here[key]
            self.num_wasted += 1

    @precondition(lambda self: not self.is_closed)
    @rule()
    def begin_turn(self) -> None:
        self.cache.begin_turn()
        self.turn += 1

    @precondition(lambda self: not self.is_closed)
    @rule(key=KEYS)
    def start(self, key: int) -> None:
        if key not in self.here:
            self.load(key, is_guess=False, spared=set())

    @precondition(lambda self: not self.is_closed)
    @rule(key=KEYS, spared=st.sets(KEYS))
    def prefetch(self, key: int, spared: set[int]) -> None:
        if key not in self.here:
            self.load(key, is_guess=True, spared=spared)

    @rule(key=KEYS)
    def demand(self, key: int) -> None:
        hits = self.cache.stats.num_hits
        self.cache.demand(key)
        self.num_demands += 1
        is_hit = key in self.here and self.here[key].is_ready
        assert self.cache.stats.num_hits - hits == is_hit

    @rule(key=KEYS)
    def pin(self, key: int) -> None:
        if key in self.here and not self.here[key].has_failed:
            self.cache.pin(key)
            self.here[key].num_pins += 1

    @rule(key=KEYS)
    def unpin(self, key: int) -> None:
        if key in self.here and self.here[key].num_pins:
            self.cache.unpin(key)
            self.here[key].num_pins -= 1
            self.drop_failed(key)

    @rule(key=KEYS)
    def use(self, key: int) -> None:
        if key in self.here and self.here[key].is_ready:
            slot = self.cache.use(key)
            assert [part[slot].numpy().tobytes() for part in self.cache.pool.parts] == self.expected[key]
            if self.here[key].last_turn is None:
                self.num_used += 1
                self.num_used_guesses += self.here[key].is_guess
            self.here[key].last_turn = self.turn

    @precondition(lambda self: not self.is_closed)
    @rule(key=KEYS)
    def pin_resident(self, key: int) -> None:
        if key in self.residents:
            self.cache.pin_resident([key])
            return
        if len(self.residents) == NUM_SLOTS - 1:
            with pytest.raises(ShapeError, match="3 resident sections leave no slot of 3"):
                self.cache.pin_resident([*self.residents, key])
            return
        if key in self.here and self.here[key].has_failed:
            with pytest.raises(SectionReadError, match="Input/output error"):
                self.cache.pin_resident([key])
            return
        if key not in self.here:
            self.load(key, is_guess=False, spared=set())
        if key in self.here:
            self.permits.decide(key, True)
            self.cache.pin_resident([key])
            self.residents.add(key)
            if not self.here[key].is_ready:
                self.arrive(key)

    @precondition(lambda self: not self.is_closed)
    @rule(key=KEYS, arrives=st.sampled_from([True, True, True, False]))
    def end_read(self, key: int, arrives: bool) -> None:
        if key not in self.here or self.here[key].is_ready or self.here[key].has_failed:
            return
        self.permits.decide(key, arrives)
        entry = self.cache._loading[key]
        assert entry.arrival is not None
        self.reader.wait_any([entry.arrival])
        if arrives:
            assert self.cache.wait_any([key])
            self.arrive(key)
            return
        with pytest.raises(SectionReadError, match="Input/output error"):
            self.cache.wait_any([key])
        self.cache.collect()
        self.here[key].has_failed = True
        self.drop_failed(key)

    @precondition(lambda self: not self.is_closed)
    @rule()
    def close(self) -> None:
        """Reads in flight are let through: with so many threads none waits in the queue for long."""
        loading = [key for key, shadow in self.here.items() if not (shadow.is_ready or shadow.has_failed)]
        for key in loading:
            self.permits.decide(key, True)
        self.reader.close()
        self.is_closed = True
        with pytest.raises(SectionReadError):
            self.cache.begin_turn()
        self.cache.collect()
        for key in loading:
            if self.cache.is_ready(key):
                self.arrive(key)
            self.here[key].has_failed = not self.here[key].is_ready
            self.drop_failed(key)

    @invariant()
    def is_as_the_table_says(self) -> None:
        for key in range(NUM_KEYS):
            assert self.cache.is_here(key) == (key in self.here)
            assert self.cache.is_ready(key) == (key in self.here and self.here[key].is_ready)
        stats = self.cache.stats
        assert (stats.num_loads, stats.num_wasted) == (self.num_loads, self.num_wasted)
        assert stats.loaded_bytes == self.num_loads * SECTION
        assert (stats.used_bytes, stats.wasted_bytes) == (self.num_used * SECTION, self.num_wasted * SECTION)
        assert (stats.prefetch_issued, stats.prefetch_used) == (self.num_guesses, self.num_used_guesses)
        assert (stats.num_recorded, stats.num_unverified) == (self.num_recorded, 0)
        ready = [key for key, shadow in self.here.items() if shadow.is_ready]
        loading = [key for key, shadow in self.here.items() if not (shadow.is_ready or shadow.has_failed)]
        assert self.cache.describe() == CacheMemory(
            NUM_SLOTS * SECTION,
            len(ready) * SECTION,
            len(loading) * SECTION,
            len(self.residents) * SECTION,
            NUM_SLOTS - len(self.here),
        )
        assert self.residents <= set(ready)
        assert stats.num_hits + stats.num_misses == self.num_demands
        for key, shadow in self.here.items():
            if shadow.is_ready:
                slot = self.cache._entries[key].slot
                found = [part[slot].numpy().tobytes() for part in self.cache.pool.parts]
                assert found == self.expected[key]


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase
