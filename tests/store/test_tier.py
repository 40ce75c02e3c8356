"""Tiers: every byte is promised once, and a cache runs over a device that is slow and answers in any order."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from fake_device import DeviceMover, DeviceSlots
from section_files import NUM_SECTIONS, PART_BYTES, hold, needs_direct_reads, read_expected, write_sections

from moesys.errors import SectionReadError, ShapeError
from moesys.store import LeastRecent, PartShape, Section, SectionCache, SectionReader
from moesys.store.open_files import ReadMode
from moesys.store.tier import HostTier, Tier

SHAPES = [PartShape((size,), torch.uint8) for size in PART_BYTES]
SLOT = sum(PART_BYTES)


@pytest.fixture
def sections(tmp_path: Path) -> dict[int, Section]:
    return write_sections(tmp_path / "weights.bin")


@pytest.fixture
def reader() -> Iterator[SectionReader]:
    with SectionReader(2) as reader:
        yield reader


@pytest.fixture
def mover(reader: SectionReader) -> Iterator[DeviceMover]:
    mover = DeviceMover(reader, seed=1)
    yield mover
    mover.close()


def fetch(cache: SectionCache[DeviceSlots], key: int) -> list[bytes]:
    return hold(cache, key, cache.pool.read_back)


def test_what_is_promised_is_counted_and_more_is_refused_with_the_sum() -> None:
    tier = Tier("host", 1000)
    tier.reserve("weights", 600)
    tier.reserve("keys and values", 100)
    tier.reserve("weights", 50)
    assert dict(tier.reserved) == {"weights": 650, "keys and values": 100}
    assert (tier.reserved_bytes, tier.free_bytes) == (750, 250)
    with pytest.raises(
        ShapeError,
        match=r"slots 251 \+ weights 650 \+ keys and values 100 = 1001 bytes is more than the 1000 of the host tier, "
        r"by 1 B; raise",
    ):
        tier.reserve("slots", 251)
    assert tier.free_bytes == 250, "a refused promise changes nothing"
    tier.reserve("slots", 250)
    assert tier.free_bytes == 0
    tier.reserve("nothing", 0)
    tier.release("weights")
    assert tier.free_bytes == 650
    with pytest.raises(
        ShapeError, match=r"weights holds nothing of the host tier; it has \['keys and values', "
    ):
        tier.release("weights")
    with pytest.raises(ShapeError, match=r"slots \(-1 bytes\) must not be below 0"):
        tier.reserve("slots", -1)
    with pytest.raises(ShapeError, match=r"the disk tier's capacity \(-5 bytes\)"):
        Tier("disk", -5)


def test_a_tier_without_bounds_counts_all_the_same() -> None:
    tier = Tier("disk")
    tier.reserve("sections", 2**60)
    assert (tier.reserved_bytes, tier.free_bytes) == (2**60, None)


def test_host_slots_are_allocated_within_the_tier(
    reader: SectionReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = HostTier(reader, 10 * SLOT)
    pool = tier.allocate_slots("experts", 7, SHAPES)
    assert dict(tier.reserved) == {"staging": 0, "experts": pool.num_bytes}
    assert pool.num_bytes == 7 * SLOT

    def fail(*arguments: object) -> None:
        raise AssertionError("memory was spent")

    monkeypatch.setattr("moesys.store.slots.allocate_weight", fail)
    with pytest.raises(
        ShapeError, match=r"more experts 256 \+ staging 0 \+ experts 448 = 704 bytes is more than"
    ):
        tier.allocate_slots("more experts", 4, SHAPES)


def test_pages_that_the_system_keeps_for_us_are_part_of_what_is_used(sections: dict[int, Section]) -> None:
    with SectionReader(1, keeps_pages=True) as reader:
        tier = HostTier(reader)
        pool = tier.allocate_slots("experts", 2, SHAPES)
        cache = SectionCache(pool, sections, reader, LeastRecent())
        cache.pin_resident([0])
        reader.close()
        assert tier.used_bytes == 2 * SLOT + 2 * mmap.PAGESIZE
        assert tier.reserved_bytes == 2 * SLOT


@needs_direct_reads
def test_the_buffers_of_direct_reads_are_part_of_what_is_used() -> None:
    with SectionReader(3, mode=ReadMode.DIRECT) as reader:
        assert HostTier(reader).used_bytes == reader.staging_bytes > 3 * 2**20


@pytest.mark.parametrize("num_slots", [1, 3, NUM_SECTIONS])
def test_a_cache_runs_unchanged_over_a_device(
    num_slots: int, tmp_path: Path, sections: dict[int, Section], mover: DeviceMover
) -> None:
    tier, draw = Tier("device", num_slots * SLOT), random.Random(2)
    cache = SectionCache(DeviceSlots(tier, num_slots, SHAPES), sections, mover, LeastRecent())
    for _ in range(100):
        key = draw.randrange(NUM_SECTIONS)
        assert fetch(cache, key) == read_expected(tmp_path / "weights.bin", key)
        guess = draw.randrange(NUM_SECTIONS)
        if not cache.is_here(guess):
            cache.prefetch(guess)
    stats = cache.stats
    on_its_way = cache.describe().in_flight_bytes
    waiting = sum(SLOT for entry in cache._entries.values() if entry.last_turn is None) - on_its_way
    assert stats.loaded_bytes == stats.used_bytes + stats.wasted_bytes + on_its_way + waiting
    assert num_slots == 1 or stats.prefetch_used > 5


def test_sections_may_arrive_at_a_device_in_any_order(
    tmp_path: Path, sections: dict[int, Section], mover: DeviceMover
) -> None:
    cache = SectionCache(DeviceSlots(Tier("device"), NUM_SECTIONS, SHAPES), sections, mover, LeastRecent())
    cache.pin_resident(range(NUM_SECTIONS))
    assert sorted(mover.order) == sorted(section.name for section in sections.values())
    assert mover.order != [section.name for section in sections.values()]
    for key in range(NUM_SECTIONS):
        assert fetch(cache, key) == read_expected(tmp_path / "weights.bin", key)


def test_a_device_of_few_bytes_refuses_slots() -> None:
    with pytest.raises(ShapeError, match=r"slots 192 = 192 bytes is more than the 191 of the device tier"):
        DeviceSlots(Tier("device", 191), 3, SHAPES)


def test_a_section_that_cannot_be_read_never_reaches_the_device(
    tmp_path: Path, sections: dict[int, Section]
) -> None:
    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == 3 * PART_BYTES[0]:
            raise OSError(5, "Input/output error")
        return os.preadv(descriptor, buffers, offset)

    with SectionReader(2, read_at=fail) as reader:
        mover = DeviceMover(reader, seed=3)
        cache = SectionCache(DeviceSlots(Tier("device"), 2, SHAPES), sections, mover, LeastRecent())
        with pytest.raises(SectionReadError, match="section 3"):
            fetch(cache, 3)
        assert fetch(cache, 4) == read_expected(tmp_path / "weights.bin", 4)
        mover.close()
    with pytest.raises(SectionReadError, match="were closed"):
        fetch(cache, 4)


def test_a_demand_hurries_a_guess_to_the_device(sections: dict[int, Section], mover: DeviceMover) -> None:
    cache = SectionCache(DeviceSlots(Tier("device"), NUM_SECTIONS, SHAPES), sections, mover, LeastRecent())
    for key in range(NUM_SECTIONS):
        assert cache.prefetch(key)
    cache.demand(11)
    while not cache.is_ready(11):
        cache.wait_any([11])
    assert mover.order.index("section 11") <= 2
