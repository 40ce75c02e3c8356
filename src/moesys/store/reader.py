"""Reads in flight: threads that bring extents of files into memory, the urgent ones first, each verified.

A read that comes short, fails or differs from its checksum is tried once more from the disk; what fails twice is a
`SectionReadError` with file, section and offset. Knows nothing of caches.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path

from moesys.errors import SectionReadError
from moesys.store.section import Extent, Section

ReadAt = Callable[[int, memoryview, int], int]
"""(file descriptor, buffer, offset) to the number of bytes read, like `os.preadv` of one buffer."""


class Urgency(IntEnum):
    """What is read first."""

    DEMAND = 0
    """Somebody waits for it."""
    PREFETCH = 1
    """A guess: only when nothing is demanded."""


class Read:
    """A section on its way. ``is_done`` becomes true with or without an error."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.error: SectionReadError | None = None
        self.num_left = len(section.extents)
        self.checksums = [0] * len(section.extents)

    @property
    def is_done(self) -> bool:
        return self.num_left == 0


class SectionReader:
    """Reads sections with ``num_threads`` requests in flight. Close it, or use it as a context."""

    def __init__(
        self,
        num_threads: int = 4,
        *,
        verifies: bool = True,
        keeps_pages: bool = False,
        read_at: ReadAt | None = None,
    ) -> None:
        """
        verifies:     whether checksums are computed and compared: those of the section, else those of its first read.
        keeps_pages:  whether the system may keep what was read in its page cache, beside our slots.
        read_at:      how bytes are read; for tests.
        """
        self._verifies = verifies
        self._keeps_pages = keeps_pages
        self._read_at = _read_at if read_at is None else read_at
        self._recorded: dict[str, tuple[int, ...]] = {}
        self._descriptors: dict[Path, int] = {}
        self._queue: list[tuple[int, int, Read, int, memoryview]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"moesys-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> SectionReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, section: Section, buffers: Sequence[memoryview], urgency: Urgency) -> Read:
        """Starts reading a section: one buffer per extent, of its size. Nobody else may touch them until it is done."""
        read = Read(section)
        with self._changed:
            for index, buffer in enumerate(buffers):
                heapq.heappush(self._queue, (urgency, next(self._order), read, index, buffer))
            self._changed.notify_all()
        return read

    def hurry(self, read: Read) -> None:
        """Makes a prefetch a demand: what of it is still in the queue goes first."""
        with self._changed:
            self._queue = [
                (Urgency.DEMAND if entry[2] is read else entry[0], *entry[1:]) for entry in self._queue
            ]
            heapq.heapify(self._queue)

    def wait_any(self, reads: Sequence[Read]) -> None:
        """Waits until at least one of the reads is done."""
        with self._changed:
            self._changed.wait_for(lambda: any(read.is_done for read in reads))

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be read."""
        return not self._queue

    def close(self) -> None:
        """Stops after the requests in flight; what waits is not read. Closes the files."""
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return
                _, _, read, index, buffer = heapq.heappop(self._queue)
            error = None
            try:
                read.checksums[index] = self._read_extent(read.section, index, buffer)
            except SectionReadError as found:
                error = found
            with self._changed:
                read.error = read.error or error
                read.num_left -= 1
                if read.is_done and read.error is None and read.section.checksums is None:
                    self._recorded.setdefault(read.section.name, tuple(read.checksums))
                self._changed.notify_all()

    def _read_extent(self, section: Section, index: int, buffer: memoryview) -> int:
        """Reads one extent, a second time if need be, and returns its checksum (0 when none is taken)."""
        extent = section.extents[index]
        reason = self._try_extent(section, index, buffer)
        if reason is not None:
            self._forget_pages(extent)
            reason = self._try_extent(section, index, buffer)
        if reason is not None:
            raise SectionReadError(
                f"{extent.path}: section {section.name} at byte {extent.offset} ({extent.num_bytes} bytes) {reason}, "
                "twice; check the disk and the file, then load the model again"
            )
        if not self._keeps_pages:
            self._forget_pages(extent)
        return zlib.crc32(buffer) if self._verifies else 0

    def _try_extent(self, section: Section, index: int, buffer: memoryview) -> str | None:
        """Returns why the extent was not read, None when it was."""
        extent = section.extents[index]
        done = 0
        try:
            descriptor = self._open(extent.path)
            while done < extent.num_bytes:
                count = self._read_at(descriptor, buffer[done:], extent.offset + done)
                if count == 0:
                    return f"ends after {done} bytes"
                done += count
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        expected = section.checksums or self._recorded.get(section.name)
        if self._verifies and expected is not None and zlib.crc32(buffer) != expected[index]:
            return "differs from its checksum"
        return None

    def _open(self, path: Path) -> int:
        with self._changed:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]

    def _forget_pages(self, extent: Extent) -> None:
        if extent.path in self._descriptors and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self._descriptors[extent.path], extent.offset, extent.num_bytes, os.POSIX_FADV_DONTNEED
            )


def _read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [buffer], offset)
