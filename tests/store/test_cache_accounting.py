"""What a cache says of itself: every count, every byte, sections that never leave, and memory that does not grow."""

from __future__ import annotations

import gc
import mmap
import os
import random
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from section_files import NUM_SECTIONS, PART_BYTES, list_sections, make_pool, read_expected, write_sections

from moesys.errors import SectionReadError, ShapeError
from moesys.store import LeastRecent, SectionCache, SectionReader
from moesys.store.cache import CacheMemory

SECTION = sum(PART_BYTES)
OPEN = Callable[..., SectionCache]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_sections(tmp_path / "weights.bin")
    return tmp_path / "weights.bin"


@pytest.fixture
def open_cache(file: Path) -> Iterator[OPEN]:
    readers: list[SectionReader] = []

    def build(num_slots: int, **options: Any) -> SectionCache:
        readers.append(SectionReader(2, **options))
        return SectionCache(make_pool(num_slots), list_sections(file), readers[-1], LeastRecent())

    yield build
    for reader in readers:
        reader.close()


def fetch(cache: SectionCache, key: int) -> list[bytes]:
    cache.begin_turn()
    cache.demand(key)
    if not cache.is_here(key):
        assert cache.start(key)
    return use(cache, key)


def use(cache: SectionCache, key: int) -> list[bytes]:
    settle(cache, key)
    slot = cache.use(key)
    return [part[slot].numpy().tobytes() for part in cache.pool.parts]


def settle(cache: SectionCache, key: int) -> None:
    while not cache.is_ready(key):
        assert cache.wait_any([key])


def test_bytes_are_used_wasted_or_not_yet_either(open_cache: OPEN) -> None:
    cache = open_cache(3)
    stats = cache.stats
    fetch(cache, 0)
    for _ in range(2):
        fetch(cache, 0)
    assert (stats.loaded_bytes, stats.used_bytes, stats.wasted_bytes) == (SECTION, SECTION, 0)
    for guess in (1, 2):
        assert cache.prefetch(guess)
    assert (stats.prefetch_issued, stats.prefetch_used) == (2, 0)
    use(cache, 1)
    use(cache, 1)
    settle(cache, 2)
    assert (stats.prefetch_issued, stats.prefetch_used) == (2, 1)
    assert (stats.loaded_bytes, stats.used_bytes, stats.wasted_bytes) == (3 * SECTION, 2 * SECTION, 0)
    for key in (3, 4, 5):
        fetch(cache, key)
    assert not cache.is_here(2)
    assert (stats.num_wasted, stats.wasted_bytes) == (1, SECTION)
    fetch(cache, 2)
    assert (stats.prefetch_issued, stats.prefetch_used) == (2, 1), "this time it was asked for"
    assert (stats.num_loads, stats.loaded_bytes, stats.used_bytes) == (7, 7 * SECTION, 6 * SECTION)


def test_a_failed_section_is_waste(open_cache: OPEN) -> None:
    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    cache = open_cache(1, read_at=fail)
    with pytest.raises(SectionReadError):
        fetch(cache, 0)
    cache.collect()
    assert (cache.stats.loaded_bytes, cache.stats.wasted_bytes, cache.stats.used_bytes) == (
        SECTION,
        SECTION,
        0,
    )
    assert (cache.stats.num_recorded, cache.stats.num_unverified) == (0, 0)


def test_waiting_is_timed_and_nothing_else(open_cache: OPEN) -> None:
    def read_slowly(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(0.02)
        return os.preadv(descriptor, buffers, offset)

    cache = open_cache(2, read_at=read_slowly)
    assert cache.start(0)
    time.sleep(0.1)
    cache.collect()
    assert cache.is_ready(0)
    assert cache.stats.stall_s == 0
    start_s = time.perf_counter()
    fetch(cache, 1)
    assert 0.015 < cache.stats.stall_s <= time.perf_counter() - start_s
    before = cache.stats.stall_s
    assert cache.start(2)
    cache.settle([2])
    assert cache.stats.stall_s > before + 0.015


def test_what_was_not_compared_with_anything_is_counted(file: Path, open_cache: OPEN) -> None:
    for verifies, expected in [(True, (NUM_SECTIONS, 0)), (False, (0, NUM_SECTIONS + 1))]:
        cache = open_cache(NUM_SECTIONS - 1, verifies=verifies)
        for key in (*range(NUM_SECTIONS), 0):
            assert fetch(cache, key) == read_expected(file, key)
        assert (cache.stats.num_recorded, cache.stats.num_unverified) == expected


def test_the_memory_of_the_slots_is_described_to_the_byte(open_cache: OPEN) -> None:
    opened = threading.Event()

    def read_when_told(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert opened.wait(10)
        return os.preadv(descriptor, buffers, offset)

    cache = open_cache(4, read_at=read_when_told)
    empty = CacheMemory(4 * SECTION, 0, 0, 0, 4)
    assert cache.describe() == empty
    assert cache.start(0)
    assert cache.prefetch(1)
    assert cache.describe() == replace(empty, in_flight_bytes=2 * SECTION, num_free=2)
    opened.set()
    settle(cache, 0)
    settle(cache, 1)
    assert cache.describe() == replace(empty, ready_bytes=2 * SECTION, num_free=2)
    cache.pin_resident([1, 2])
    assert cache.describe() == CacheMemory(4 * SECTION, 3 * SECTION, 0, 2 * SECTION, 1)


def test_residents_never_leave(file: Path, open_cache: OPEN) -> None:
    cache = open_cache(3)
    cache.pin_resident([5, 7, 5])
    assert cache.is_ready(5)
    assert cache.is_ready(7)
    cache.pin_resident([7])
    draw = random.Random(3)
    for _ in range(60):
        key = draw.randrange(NUM_SECTIONS)
        hits = cache.stats.num_hits
        assert fetch(cache, key) == read_expected(file, key)
        assert key not in (5, 7) or cache.stats.num_hits == hits + 1
    assert cache.stats.num_loads - 2 <= cache.stats.num_misses
    with pytest.raises(
        ShapeError, match="3 resident sections leave no slot of 3 for the other 9; have at most 2"
    ):
        cache.pin_resident([1])


def test_all_sections_may_be_resident(open_cache: OPEN) -> None:
    cache = open_cache(NUM_SECTIONS)
    cache.pin_resident(range(NUM_SECTIONS))
    assert cache.describe().resident_bytes == NUM_SECTIONS * SECTION


def test_residents_need_slots_that_are_not_held(open_cache: OPEN) -> None:
    cache = open_cache(2)
    for key in (0, 1):
        fetch(cache, key)
        cache.pin(key)
    with pytest.raises(ShapeError, match="all 2 slots are pinned"):
        cache.pin_resident([2])
    cache.unpin(0)
    cache.pin_resident([2])
    assert not cache.is_here(0)


def test_residents_that_cannot_be_read_are_none(file: Path, open_cache: OPEN) -> None:
    def fail_at_two(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == 2 * PART_BYTES[0]:
            raise OSError(5, "Input/output error")
        return os.preadv(descriptor, buffers, offset)

    cache = open_cache(3, read_at=fail_at_two)
    with pytest.raises(SectionReadError, match="section 2"):
        cache.pin_resident([1, 2])
    assert cache.describe().resident_bytes == 0
    for key in (3, 4, 5, 6):
        assert fetch(cache, key) == read_expected(file, key)
    assert not cache.is_here(1), "its pin is gone"


def test_an_interrupted_wait_leaves_a_cache_that_works(
    file: Path, open_cache: OPEN, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(2)
    with monkeypatch.context() as patch:

        def interrupt(reads: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(cache._reader, "wait_any", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.pin_resident([0])
    assert cache.stats.stall_s > 0
    for key in range(4):
        assert fetch(cache, key) == read_expected(file, key)


def test_a_thousand_demands_allocate_nothing_that_stays(
    file: Path, open_cache: OPEN, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, draw = open_cache(3), random.Random(6)
    keys = [draw.randrange(NUM_SECTIONS) for _ in range(1000)]

    def run(keys: Sequence[int]) -> None:
        for key in keys:
            fetch(cache, key)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("memory for slots or staging was allocated")

    run(keys[:200])
    places = [part.data_ptr() for part in cache.pool.parts]
    for owner, name in [(torch, "empty"), (torch, "zeros"), (mmap, "mmap")]:
        monkeypatch.setattr(owner, name, refuse)
    gc.collect()
    tracemalloc.start()
    try:
        run(keys[:100])
        gc.collect()
        start, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        run(keys)
        gc.collect()
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.stats.num_loads > 500
    assert now - start < 8 * 1024, "nothing is kept for a demand"
    assert peak - start < 64 * 1024, "what a demand throws away is bounded"
    assert [part.data_ptr() for part in cache.pool.parts] == places
