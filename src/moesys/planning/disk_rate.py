"""How fast a disk delivers sections: cut into pieces, several in flight, in order or at random places of a file.

Bytes land in memory of our own and, where the page cache was in between, are dropped from it: as the engine's reader
does it, but for the checksums. How many pieces are in flight, and past the page cache or through it, is what a plan
chooses between.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from moesys.planning.probe_file import ProbeFile
from moesys.store import ReadMode
from moesys.store.open_files import ReadAt, read_vector


@dataclass(frozen=True)
class ReadPattern:
    """How a file is read.

    section_bytes:  of what lies together; a multiple of 4096.
    depth:          pieces in flight.
    is_sequential:  whether each section begins where the last one ended; else anywhere.
    piece_bytes:    of one request at most; a multiple of 4096.
    """

    mode: ReadMode
    section_bytes: int
    depth: int
    is_sequential: bool = False
    piece_bytes: int = 2 * 2**20


@dataclass(frozen=True)
class DiskRate:
    """What a pattern reached."""

    pattern: ReadPattern
    bytes_per_s: float


class DiskReader:
    """Reads a file by a pattern, in threads of its own.

    read_at, clock: for tests.
    """

    def __init__(
        self,
        probe: ProbeFile,
        pattern: ReadPattern,
        *,
        read_at: ReadAt | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._probe = probe
        self._pattern = pattern
        self._read_at = read_vector if read_at is None else read_at
        self._clock = clock
        self._pieces = _list_pieces(pattern, probe.num_bytes)
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._last = 0.0
        self._is_stopped = False

    def measure(self, seconds: float) -> DiskRate:
        """Reads for about so long, one piece per thread at least. Raises `OSError` where the system refuses."""
        start = self._clock()
        self._last = start
        with ThreadPoolExecutor(self._pattern.depth, "moesys-probe") as pool:
            workers = [pool.submit(self._work, start + seconds) for _ in range(self._pattern.depth)]
            try:
                for worker in workers:
                    worker.result()
            finally:
                self._is_stopped = True
        return DiskRate(self._pattern, self._num_bytes / max(self._last - start, 1e-9))

    def stop(self) -> None:
        """Ends a measurement in another thread after the requests in flight."""
        self._is_stopped = True

    def _work(self, deadline: float) -> None:
        descriptor = self._probe.descriptors[self._pattern.mode]
        # A mapping begins at a page, as O_DIRECT wants it.
        with mmap.mmap(-1, self._pattern.piece_bytes) as memory, memoryview(memory) as buffer:
            while True:
                with self._lock:
                    offset, num_bytes = next(self._pieces)
                with buffer[:num_bytes] as piece:
                    count = self._read_piece(descriptor, piece, offset)
                if self._pattern.mode is ReadMode.BUFFERED and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
                with self._lock:
                    self._num_bytes += count
                    self._last = self._clock()
                    if self._is_stopped or self._last >= deadline:
                        return

    def _read_piece(self, descriptor: int, piece: memoryview, offset: int) -> int:
        try:
            return self._read_at(descriptor, [piece], offset)
        except OSError:
            # The other threads shall not go on until their time is over.
            self._is_stopped = True
            raise


def _list_pieces(pattern: ReadPattern, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields (offset, bytes) of requests, for ever: each section once before any comes again."""
    last = max(num_bytes - pattern.section_bytes, 0)
    sections = list(range(0, last + 1, pattern.section_bytes))
    if not pattern.is_sequential:
        random.Random(0).shuffle(sections)
    for section in itertools.cycle(sections):
        for start in range(0, pattern.section_bytes, pattern.piece_bytes):
            yield section + start, min(pattern.piece_bytes, pattern.section_bytes - start)
