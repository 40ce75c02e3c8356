"""Passes over sections in order: what is read ahead waits for what is demanded, and is counted apart from guesses."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from section_files import NUM_SECTIONS, make_pool, write_sections

from moesys.store import LeastRecent, ReadEvent, SectionCache, SectionReader, Urgency
from moesys.store.ring import Ring

GROUPS = [range(start, start + 4) for start in range(0, NUM_SECTIONS, 4)]
NUM_SLOTS = 8


class Watched:
    """A cache whose reads are listed in the order in which they begin, and can be stopped."""

    def __init__(self, path: Path) -> None:
        self.sections = write_sections(path)
        self.begun: list[int] = []
        self.events: list[ReadEvent] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self.stopped = threading.Event()
        self.reader = SectionReader(1, read_at=self.read, on_read=self.events.append)
        self.cache = SectionCache(make_pool(NUM_SLOTS), self.sections, self.reader, LeastRecent())
        self.ring = Ring(self.cache, GROUPS)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        owners = [key for key, section in self.sections.items() if section.extents[0].offset == offset]
        self.begun.extend(owners)
        if not self.may_read.is_set():
            self.stopped.set()
        self.may_read.wait(20)
        return os.preadv(descriptor, buffers, offset)

    def compute_group(self, index: int) -> None:
        """As a layer that needs all of its sections does."""
        self.cache.begin_turn()
        self.ring.begin_group(index)
        for key in GROUPS[index]:
            self.cache.demand(key)
            assert self.cache.is_here(key) or self.cache.start(key)
            self.cache.pin(key)
        self.ring.read_ahead()
        for key in GROUPS[index]:
            while not self.cache.is_ready(key):
                self.cache.wait_any([key])
            self.cache.use(key)
            self.cache.unpin(key)
            self.ring.spend(key)
        self.ring.read_ahead()
        self.ring.end_group(index)

    def compute_pass(self) -> None:
        for index in range(len(GROUPS)):
            self.compute_group(index)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path / "sections")
    with watched.reader:
        yield watched
        watched.may_read.set()


def test_what_is_read_ahead_is_a_prefetch_and_no_guess(watched: Watched) -> None:
    watched.compute_pass()
    stats = watched.cache.stats
    assert stats.num_loads == NUM_SECTIONS, "after a first pass nobody expects a second one"
    assert stats.ahead_issued == stats.ahead_used == NUM_SECTIONS - 4, "all but the first group"
    assert (stats.prefetch_issued, stats.prefetch_used) == (0, 0)
    assert not watched.ring.leave()


def test_a_section_that_is_demanded_on_its_way_is_a_demand(watched: Watched) -> None:
    watched.may_read.clear()
    watched.ring.begin_group(0)
    watched.ring.read_ahead()
    assert watched.stopped.wait(20)
    watched.cache.demand(2)
    watched.may_read.set()
    watched.cache.settle([0, 1, 2, 3])
    watched.reader.close()
    urgent = {event.section for event in watched.events if event.urgency is Urgency.DEMAND}
    assert urgent <= {"section 2"}
    assert {event.urgency for event in watched.events if event.section != "section 2"} == {Urgency.PREFETCH}


def test_what_is_read_for_a_pass_that_never_comes_waits_for_every_demand(watched: Watched) -> None:
    watched.compute_pass()
    for index in range(len(GROUPS) - 1):
        watched.compute_group(index)
    watched.cache.settle(range(NUM_SECTIONS))
    before = watched.cache.stats.num_loads
    here = {key for key in range(NUM_SECTIONS) if watched.cache.is_here(key)}
    assert set(GROUPS[-1]) <= here, "so that the last group waits for no read"
    watched.may_read.clear()
    watched.compute_group(len(GROUPS) - 1)
    num_ahead = watched.cache.stats.num_loads - before
    assert 2 <= num_ahead <= watched.ring.num_passing, "only slots that sections pass through are taken"
    assert watched.stopped.wait(20)
    demanded = next(key for key in GROUPS[1] if not watched.cache.is_here(key))
    watched.ring.leave()
    assert watched.cache.start(demanded)
    watched.begun.clear()
    watched.may_read.set()
    watched.cache.settle(range(NUM_SECTIONS))
    assert watched.begun[0] == demanded
    assert len(watched.begun) == num_ahead, "one of those that were read ahead had begun before"


def test_a_group_given_up_before_others_began_ends_none_of_them(watched: Watched) -> None:
    last = len(GROUPS) - 1
    watched.ring.begin_group(0)
    watched.ring.begin_group(last)
    watched.ring.read_ahead()
    watched.ring.end_group(0)
    assert watched.ring._group == last
    watched.ring.end_group(last)
    assert watched.ring._group is None
