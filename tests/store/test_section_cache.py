"""Sections in slots: right bytes for any number of slots and any order, and never a wrong one after a fault."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from section_files import (
    NUM_REQUESTS,
    NUM_SECTIONS,
    PART_BYTES,
    fetch,
    list_sections,
    make_pool,
    read_expected,
    write_sections,
)

from moesys.errors import SectionReadError, ShapeError
from moesys.store import HitCounts, LeastFrequent, LeastRecent, Policy, SectionCache, SectionReader
from moesys.store.reader import ReadAt

POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LeastRecent,
    "lfu": LeastFrequent,
    "hits": lambda: HitCounts(threshold=2, decay=0.5, period=7),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_sections(tmp_path / "weights.bin")
    return tmp_path / "weights.bin"


@pytest.fixture
def open_cache(file: Path) -> Iterator[Callable[..., SectionCache]]:
    readers: list[SectionReader] = []

    def build(num_slots: int, policy: Policy | None = None, read_at: ReadAt | None = None) -> SectionCache:
        readers.append(SectionReader(3, read_at=read_at))
        return SectionCache(make_pool(num_slots), list_sections(file), readers[-1], policy or LeastRecent())

    yield build
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_slots", [1, 2, 5, NUM_SECTIONS])
def test_every_section_is_right_for_any_number_of_slots(
    num_slots: int, policy: str, file: Path, open_cache: Callable[..., SectionCache]
) -> None:
    cache, draw = open_cache(num_slots, POLICIES[policy]()), random.Random(1)
    for _ in range(200):
        key = draw.randrange(NUM_SECTIONS)
        assert fetch(cache, key) == read_expected(file, key)
    stats = cache.stats
    assert stats.num_hits + stats.num_misses == 200
    assert stats.num_loads == stats.num_misses
    assert stats.loaded_bytes == stats.num_loads * sum(PART_BYTES)
    assert stats.num_wasted == 0
    assert (stats.num_loads == NUM_SECTIONS) == (num_slots == NUM_SECTIONS)


def test_what_is_pinned_never_leaves(file: Path, open_cache: Callable[..., SectionCache]) -> None:
    cache = open_cache(2)
    fetch(cache, 0)
    cache.pin(0)
    slot = cache.use(0)
    for key in range(1, NUM_SECTIONS):
        assert fetch(cache, key) == read_expected(file, key)
    assert cache.is_ready(0)
    assert cache.pool.parts[0][slot].numpy().tobytes() == read_expected(file, 0)[0]
    cache.pin(11)
    assert not cache.start(5), "both slots are pinned"


def test_a_guess_takes_the_slot_of_what_was_not_used_lately_and_never_of_another_guess(
    open_cache: Callable[..., SectionCache],
) -> None:
    cache = open_cache(4)
    for key in (0, 1, 2):
        fetch(cache, key)
    assert cache.prefetch(10), "a slot is free"
    assert cache.prefetch(11), "0 was used neither in this turn nor in the one before"
    assert not cache.is_here(0)
    assert not cache.prefetch(9), "1 and 2 were used lately, 10 and 11 wait for their first use"
    fetch(cache, 10)
    assert cache.is_here(1)
    assert not cache.prefetch(9, spared={1}), "1 is guessed too"
    assert cache.prefetch(9)
    assert not cache.is_here(1)
    assert cache.stats.num_wasted == 0
    for guess in (9, 11):
        while not cache.is_ready(guess):
            assert cache.wait_any([guess])
    assert not cache.wait_any([9]), "nothing is on its way"
    for key in (5, 6, 7, 8):
        fetch(cache, key)
    assert cache.stats.num_wasted == 2, "9 and 11 left unused"


@pytest.mark.parametrize("num_bad", [1, 2])
@pytest.mark.parametrize("fault", ["short", "error", "flipped"])
def test_a_fault_is_read_again_once_and_never_becomes_wrong_bytes(
    fault: str, num_bad: int, file: Path, open_cache: Callable[..., SectionCache]
) -> None:
    left, lock = 0, threading.Lock()

    def read_badly(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal left
        with lock:
            is_good, left = left == 0, max(left - 1, 0)
        if is_good:
            return os.preadv(descriptor, buffers, offset)
        if fault == "error":
            raise OSError(5, "Input/output error")
        if fault == "short":
            return 0
        count = os.preadv(descriptor, buffers, offset)
        buffers[0][0] ^= 1
        return count

    cache = open_cache(1, read_at=read_badly)
    for key in (0, 1):
        fetch(cache, key)
    left = num_bad
    if num_bad == 1:
        assert fetch(cache, 0) == read_expected(file, 0)
        return
    left = 2 * NUM_REQUESTS
    with pytest.raises(SectionReadError, match=rf"{file}: section section 0 at byte \d+ .* twice"):
        fetch(cache, 0)
    assert left == 0
    assert fetch(cache, 0) == read_expected(file, 0), "the slot is free again"


def test_a_thousand_random_faults_give_right_bytes_or_an_error(
    file: Path, open_cache: Callable[..., SectionCache]
) -> None:
    draw, faults, lock = random.Random(3), 0, threading.Lock()

    def read_badly(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal faults
        with lock:
            is_good, kind, place = draw.random() > 0.4, draw.randrange(4), draw.randrange(len(buffers[-1]))
            faults += not is_good
        match -1 if is_good else kind:
            case 0:
                raise OSError(5, "Input/output error")
            case 1:
                return 0
            case 2:
                return os.preadv(descriptor, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)
        count = os.preadv(descriptor, buffers, offset)
        if not is_good:
            buffers[-1][place] ^= 1 << place % 8
        return count

    cache = open_cache(3)
    for key in range(NUM_SECTIONS):
        fetch(cache, key)
    cache._reader._read_at = read_badly
    errors = 0
    while faults < 1000:
        key = draw.randrange(NUM_SECTIONS)
        try:
            assert fetch(cache, key) == read_expected(file, key)
        except SectionReadError:
            errors += 1
    assert errors > 20


def test_all_who_wait_for_a_section_hear_that_it_failed(open_cache: Callable[..., SectionCache]) -> None:
    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    cache = open_cache(1, read_at=fail)
    assert cache.start(3)
    for _ in range(2):
        cache.pin(3)
    for _ in range(2):
        with pytest.raises(SectionReadError, match="Input/output error"):
            cache.wait_any([3])
    assert not cache.start(4), "the slot is free when both have heard of it"
    cache.unpin(3)
    cache.unpin(3)
    assert not cache.is_here(3)
    assert cache.start(4)
    assert cache.stats.num_wasted == 1


def test_a_failed_guess_is_read_anew_when_it_is_needed(
    file: Path, open_cache: Callable[..., SectionCache]
) -> None:
    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    cache = open_cache(2, read_at=fail)
    assert cache.prefetch(3)
    read = cache._loading[3].arrival
    assert read is not None
    cache._reader.wait_any([read])
    cache._reader._read_at = os.preadv
    assert fetch(cache, 3) == read_expected(file, 3)


def test_a_demand_makes_a_guess_under_way_urgent(open_cache: Callable[..., SectionCache]) -> None:
    cache = open_cache(2)
    hurried: list[str] = []
    cache._reader.hurry = lambda read: hurried.append(read.section.name)
    assert cache.prefetch(3)
    cache.demand(3)
    cache.demand(4)
    while not cache.is_ready(3):
        assert cache.wait_any([3])
    cache.demand(3)
    assert hurried == ["section 3"]
    assert (cache.stats.num_hits, cache.stats.num_misses) == (1, 2)


def test_a_cache_whose_reader_was_closed_says_so(open_cache: Callable[..., SectionCache]) -> None:
    cache = open_cache(NUM_SECTIONS)
    fetch(cache, 0)
    cache._reader.close()
    with pytest.raises(SectionReadError, match="the files of this model were closed"):
        fetch(cache, 0)


def test_finding_a_victim_looks_at_few_of_many_slots(open_cache: Callable[..., SectionCache]) -> None:
    policy, asked = LeastRecent(), 0

    def may_leave(key: object) -> bool:
        nonlocal asked
        asked += 1
        return True

    for key in range(3000):
        policy.record_load(key)
        policy.record_use(key)
    for key in range(100):
        assert policy.choose_victim(may_leave) == key
        policy.record_eviction(key)
    assert asked == 100


def test_hit_counts_keep_what_is_proven_and_throw_out_the_least_hit_of_it() -> None:
    policy = HitCounts(threshold=2, decay=1.0, period=1000)
    for key in "abcd":
        policy.record_load(key)
        policy.record_use(key)
    for key in "aabbbc":
        policy.record_use(key)
    assert policy.choose_victim(lambda key: True) == "c", "d is new, c has the fewest hits of the proven"
    assert policy.choose_victim(lambda key: key == "d") == "d", "nobody is proven: the least of all"
    assert policy.choose_victim(lambda key: False) is None
    decaying = HitCounts(threshold=2, decay=0.1, period=4)
    for key in "ab":
        decaying.record_load(key)
        decaying.record_use(key)
    decaying.record_use("a")
    decaying.record_use("a")
    assert decaying.choose_victim(lambda key: True) == "b", "decayed below the threshold, the least leaves"


@pytest.mark.parametrize("policy", POLICIES)
def test_the_use_for_which_a_section_came_is_its_first(policy: str) -> None:
    chosen = POLICIES[policy]()
    for key in "ab":
        chosen.record_load(key)
    chosen.record_use("a")
    assert chosen.choose_victim(lambda key: True) == "b", "a was used, b only loaded"


def test_frequency_outlives_an_eviction() -> None:
    policy = LeastFrequent()
    for key in "aab":
        if key not in policy._loaded:
            policy.record_load(key)
        policy.record_use(key)
    policy.record_eviction("a")
    policy.record_load("a")
    assert policy.choose_victim(lambda key: True) == "b"


def test_a_pool_needs_slots() -> None:
    with pytest.raises(ShapeError, match="at least 1 slot, got 0"):
        make_pool(0)
