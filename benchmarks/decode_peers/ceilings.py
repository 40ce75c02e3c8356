"""What the disk gives at best to someone who reads experts: plain reads, in every mode, best rate taken."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

READERS = (2, 4)
READ_BYTES = 12 * 2**20
"""About the size of an expert, a multiple of what direct reads are aligned to."""
SAMPLE_BYTES = 2**29


def measure_disk_rates(paths: Sequence[Path], seed: int) -> dict[str, float]:
    """Returns bytes per second of cold reads at random places, by mode and number of readers.

    Drops the files from the page cache before each sample and afterwards. A file system that refuses direct reads has
    no rates for them.
    """
    places = [(path, at) for path in paths for at in range(0, path.stat().st_size - READ_BYTES, READ_BYTES)]
    random.Random(seed).shuffle(places)
    num_reads = min(SAMPLE_BYTES // READ_BYTES, len(places))
    rates: dict[str, float] = {}
    modes = {"buffered": 0, "direct": getattr(os, "O_DIRECT", 0)}
    for number, (mode, readers) in enumerate((mode, n) for mode in modes for n in READERS):
        first = number * num_reads % len(places)
        sample = (places[first:] + places[:first])[:num_reads]
        drop(paths)
        try:
            rates[f"{mode} x{readers}"] = _measure(sample, modes[mode], readers)
        except OSError:
            continue
    drop(paths)
    return rates


def drop(paths: Sequence[Path]) -> None:
    """Makes the next reader of the files read the disk."""
    os.sync()
    for path in paths:
        with _open(path, 0) as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _measure(places: Sequence[tuple[Path, int]], flags: int, readers: int) -> float:
    descriptors = {path: os.open(path, os.O_RDONLY | flags) for path, _ in places}
    buffers = [mmap.mmap(-1, READ_BYTES) for _ in range(readers)]

    def read_share(number: int) -> int:
        share = places[number::readers]
        return sum(os.preadv(descriptors[path], [buffers[number]], at) for path, at in share)

    try:
        started = time.perf_counter()
        with ThreadPoolExecutor(readers) as pool:
            num_bytes = sum(pool.map(read_share, range(readers)))
        return num_bytes / (time.perf_counter() - started)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


@contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
