"""A file of small sections for tests: each has two parts in different places, the first in two pieces."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesys.store import Extent, PartShape, Section, SectionCache, SlotPool, StoredFile

NUM_SECTIONS, PART_BYTES = 12, (40, 24)
NUM_REQUESTS = 2
"""Of one section: its first part lies in one piece of the file, though it is two extents."""


def _allows_direct_reads() -> bool:
    if not hasattr(os, "O_DIRECT"):
        return False
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            return False
    return True


needs_direct_reads = pytest.mark.skipif(
    not _allows_direct_reads(), reason="the file system of temporary files has no direct reads"
)


def write_sections(path: Path) -> dict[int, Section]:
    path.write_bytes(random.Random(0).randbytes(NUM_SECTIONS * sum(PART_BYTES)))
    return list_sections(path)


def list_sections(path: Path) -> dict[int, Section]:
    first, second = PART_BYTES
    half = NUM_SECTIONS * first
    file = identify(path)
    return {
        i: Section(
            f"section {i}",
            (
                Extent(file, i * first, 16, 0),
                Extent(file, i * first + 16, first - 16, 0, 16),
                Extent(file, half + i * second, second, 1),
            ),
        )
        for i in range(NUM_SECTIONS)
    }


def identify(path: Path) -> StoredFile:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return StoredFile.identify(path, descriptor)
    finally:
        os.close(descriptor)


def read_expected(path: Path, key: int) -> list[bytes]:
    data, (first, second) = path.read_bytes(), PART_BYTES
    half = NUM_SECTIONS * first
    return [data[key * first : (key + 1) * first], data[half + key * second : half + (key + 1) * second]]


def make_pool(num_slots: int) -> SlotPool:
    return SlotPool(num_slots, [PartShape((size,), torch.uint8) for size in PART_BYTES])


def make_buffers(section: Section) -> list[memoryview]:
    return [memoryview(bytearray(extent.num_bytes)) for extent in section.extents]


def hold(cache: SectionCache[Any], key: int, read_slot: Callable[[int], list[bytes]]) -> list[bytes]:
    """Demands a section, as somebody who needs it now does, and returns what ``read_slot`` finds in its slot."""
    cache.begin_turn()
    cache.demand(key)
    if not cache.is_here(key):
        assert cache.start(key)
    cache.pin(key)
    try:
        while not cache.is_ready(key):
            cache.wait_any([key])
        return read_slot(cache.use(key))
    finally:
        cache.unpin(key)


def fetch(cache: SectionCache[SlotPool], key: int) -> list[bytes]:
    """The bytes of a section, as somebody who needs it now gets them."""
    return hold(cache, key, lambda slot: [part[slot].numpy().tobytes() for part in cache.pool.parts])
