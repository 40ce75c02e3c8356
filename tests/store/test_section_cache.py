"""Sections in slots: right bytes for any number of slots and any order, and never a wrong one after a fault."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moesys.errors import SectionReadError
from moesys.store import (
    Extent,
    HitCounts,
    LeastFrequent,
    LeastRecent,
    Policy,
    Section,
    SectionCache,
    SectionReader,
    SlotPool,
    Urgency,
)
from moesys.store.reader import ReadAt
from moesys.store.slots import PartShape

NUM_SECTIONS, PART_BYTES = 12, (40, 24)
POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LeastRecent,
    "lfu": LeastFrequent,
    "hits": lambda: HitCounts(threshold=2, decay=0.5, period=7),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(random.Random(0).randbytes(NUM_SECTIONS * sum(PART_BYTES)))
    return path


def list_sections(path: Path) -> dict[int, Section]:
    """Each section has its two parts in different places of the file, the first in two pieces."""
    first, second = PART_BYTES
    half = NUM_SECTIONS * first
    return {
        i: Section(
            f"section {i}",
            (
                Extent(path, i * first, 16, 0),
                Extent(path, i * first + 16, first - 16, 0, 16),
                Extent(path, half + i * second, second, 1),
            ),
        )
        for i in range(NUM_SECTIONS)
    }


def read_expected(path: Path, key: int) -> list[bytes]:
    data, (first, second) = path.read_bytes(), PART_BYTES
    half = NUM_SECTIONS * first
    return [data[key * first : (key + 1) * first], data[half + key * second : half + (key + 1) * second]]


def make_pool(num_slots: int) -> SlotPool:
    return SlotPool(num_slots, [PartShape((size,), torch.uint8) for size in PART_BYTES])


@pytest.fixture
def open_cache(file: Path) -> Iterator[Callable[..., SectionCache]]:
    readers: list[SectionReader] = []

    def build(num_slots: int, policy: Policy | None = None, read_at: ReadAt | None = None) -> SectionCache:
        readers.append(SectionReader(3, read_at=read_at))
        return SectionCache(make_pool(num_slots), list_sections(file), readers[-1], policy or LeastRecent())

    yield build
    for reader in readers:
        reader.close()


def fetch(cache: SectionCache, key: int) -> list[bytes]:
    """The bytes of a section, as somebody who needs it now gets them."""
    cache.demand(key)
    if not cache.is_here(key):
        assert cache.start(key, Urgency.DEMAND)
    cache.pin(key)
    try:
        while not cache.is_ready(key):
            cache.wait_any([key])
        slot = cache.use(key)
        return [part[slot].numpy().tobytes() for part in cache.pool.parts]
    finally:
        cache.unpin(key)


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
    assert not cache.start(5, Urgency.DEMAND), "both slots are pinned"


@pytest.mark.parametrize("num_bad", [1, 2])
@pytest.mark.parametrize("fault", ["short", "error", "flipped"])
def test_a_fault_is_read_again_once_and_never_becomes_wrong_bytes(
    fault: str, num_bad: int, file: Path, open_cache: Callable[..., SectionCache]
) -> None:
    left = 0

    def read_badly(descriptor: int, buffer: memoryview, offset: int) -> int:
        nonlocal left
        if left == 0:
            return os.preadv(descriptor, [buffer], offset)
        left -= 1
        if fault == "error":
            raise OSError(5, "Input/output error")
        if fault == "short":
            return 0
        count = os.preadv(descriptor, [buffer], offset)
        buffer[0] ^= 1
        return count

    cache = open_cache(1, read_at=read_badly)
    for key in (0, 1):
        fetch(cache, key)
    left = num_bad
    if num_bad == 1:
        assert fetch(cache, 0) == read_expected(file, 0)
        return
    left = 2 * len(list_sections(file)[0].extents)
    with pytest.raises(SectionReadError, match=rf"{file}: section section 0 at byte \d+ .* twice"):
        fetch(cache, 0)
    assert left == 0
    assert fetch(cache, 0) == read_expected(file, 0), "the slot is free again"


def test_a_thousand_random_faults_give_right_bytes_or_an_error(
    file: Path, open_cache: Callable[..., SectionCache]
) -> None:
    draw, faults = random.Random(3), 0

    def read_badly(descriptor: int, buffer: memoryview, offset: int) -> int:
        nonlocal faults
        if draw.random() > 0.4:
            return os.preadv(descriptor, [buffer], offset)
        faults += 1
        match draw.randrange(4):
            case 0:
                raise OSError(5, "Input/output error")
            case 1:
                return 0
            case 2:
                return os.preadv(descriptor, [buffer[: max(1, len(buffer) // 2)]], offset)
        count = os.preadv(descriptor, [buffer], offset)
        buffer[draw.randrange(len(buffer))] ^= 1 << draw.randrange(8)
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


def test_hit_counts_keep_what_is_proven_and_throw_out_the_least_hit_of_it() -> None:
    policy = HitCounts(threshold=2, decay=1.0, period=1000)
    for key in "abcd":
        policy.record_load(key)
    for key in "aabbbc":
        policy.record_use(key)
    assert policy.choose_victim("abcd") == "c", "d is new, c has the fewest hits of the proven"
    assert policy.choose_victim("d") == "d", "nobody is proven: the least of all"
    decaying = HitCounts(threshold=2, decay=0.1, period=4)
    for key in "ab":
        decaying.record_load(key)
    decaying.record_use("a")
    decaying.record_use("a")
    assert decaying.choose_victim("ab") == "b", "decayed below the threshold, the least of all leaves"
