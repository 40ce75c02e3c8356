"""Reads in flight: threads that bring extents of files into memory, the urgent ones first, each verified.

A read that comes short, fails or differs from its checksum is tried once more from the disk; what fails twice is a
`SectionReadError` with file, section and offset. Whatever happens, a read ends: nobody waits for ever. Knows nothing of
caches.
"""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

from moesys.errors import SectionReadError, ShapeError
from moesys.store.section import Extent, Section
from moesys.store.stored_file import StoredFile

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

    def __init__(self, section: Section, buffers: Sequence[memoryview]) -> None:
        self.section = section
        self.buffers = tuple(buffers)
        self.error: SectionReadError | None = None
        self.num_left = len(section.extents)

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
        verifies:     whether checksums are computed and compared: those of the section, else those of the first read.
        keeps_pages:  whether the system may keep what was read in its page cache, beside our slots.
        read_at:      how bytes are read; for tests.
        """
        self._verifies = verifies
        self._keeps_pages = keeps_pages
        self._read_at = _read_at if read_at is None else read_at
        self._recorded: dict[Extent, int] = {}
        self._descriptors: dict[Path, int] = {}
        self._waiting: dict[Urgency, dict[Read, deque[int]]] = {urgency: {} for urgency in Urgency}
        lock = threading.Lock()
        self._has_work = threading.Condition(lock)
        self._has_finished = threading.Condition(lock)
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

    def require_open(self) -> None:
        """Raises `SectionReadError` when the reader was closed."""
        if self._is_closed:
            raise SectionReadError(
                "the files of this model were closed; use it while they are open, or load it again"
            )

    def submit(self, section: Section, buffers: Sequence[memoryview], urgency: Urgency) -> Read:
        """Starts reading a section: one buffer per extent, of its size. Nobody else may touch them until it is done.

        Raises `ShapeError` for other buffers, and `SectionReadError` when the reader was closed.
        """
        sizes = [extent.num_bytes for extent in section.extents]
        if [len(buffer) for buffer in buffers] != sizes:
            raise ShapeError(
                f"section {section.name} needs buffers of {sizes} bytes, got {[len(buffer) for buffer in buffers]}"
            )
        read = Read(section, buffers)
        with self._has_work:
            self.require_open()
            self._waiting[urgency][read] = deque(range(len(buffers)))
            self._has_work.notify(len(buffers))
        return read

    def hurry(self, read: Read) -> None:
        """Makes a prefetch a demand: what of it still waits goes before all prefetches."""
        with self._has_work:
            extent_ids = self._waiting[Urgency.PREFETCH].pop(read, None)
            if extent_ids is not None:
                self._waiting[Urgency.DEMAND][read] = extent_ids

    def wait_any(self, reads: Sequence[Read]) -> None:
        """Waits until at least one of the reads is done."""
        with self._has_finished:
            self._has_finished.wait_for(lambda: any(read.is_done for read in reads))

    def close(self) -> None:
        """Stops after the requests in flight; what waits ends with an error, unread. Closes the files."""
        with self._has_work:
            self._is_closed = True
            for waiting in self._waiting.values():
                for read, extent_ids in waiting.items():
                    error = SectionReadError(
                        f"section {read.section.name} was not read: its files were closed before; load the model again"
                    )
                    self._finish(read, len(extent_ids), error)
                waiting.clear()
            self._has_work.notify_all()
        for thread in self._threads:
            thread.join()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            read, extent_id = taken
            error = None
            try:
                self._read_extent(read.section, extent_id, read.buffers[extent_id])
            except SectionReadError as found:
                error = found
            except Exception as found:  # noqa: BLE001  whoever waits must learn of it, and other reads must go on
                error = SectionReadError(
                    f"{_describe(read.section, extent_id)} could not be read: {type(found).__name__}: {found}"
                )
                error.__cause__ = found
            with self._has_finished:
                self._finish(read, 1, error)

    def _take(self) -> tuple[Read, int] | None:
        """Waits for the next extent to read, the most urgent one; returns None when the reader was closed."""
        with self._has_work:
            self._has_work.wait_for(lambda: self._is_closed or any(self._waiting.values()))
            for waiting in self._waiting.values():
                for read, extent_ids in waiting.items():
                    extent_id = extent_ids.popleft()
                    if not extent_ids:
                        del waiting[read]
                    return read, extent_id
            return None

    def _finish(self, read: Read, num_extents: int, error: SectionReadError | None) -> None:
        read.error = read.error or error
        read.num_left -= num_extents
        if read.is_done:
            self._has_finished.notify_all()

    def _read_extent(self, section: Section, extent_id: int, buffer: memoryview) -> None:
        """Reads one extent, a second time if need be."""
        extent = section.extents[extent_id]
        reason = self._try_extent(section, extent_id, buffer)
        if reason is not None:
            self._forget_pages(extent)
            reason = self._try_extent(section, extent_id, buffer)
        if reason is not None:
            raise SectionReadError(
                f"{_describe(section, extent_id)} {reason}, twice; check the disk and the file, then load the model "
                "again"
            )
        if not self._keeps_pages:
            self._forget_pages(extent)

    def _try_extent(self, section: Section, extent_id: int, buffer: memoryview) -> str | None:
        """Returns why the extent was not read, None when it was."""
        extent = section.extents[extent_id]
        done = 0
        try:
            descriptor = self._open(extent.file)
            while done < extent.num_bytes:
                count = self._read_at(descriptor, buffer[done:], extent.offset + done)
                if count == 0:
                    return f"ends after {done} bytes"
                done += count
        except SectionReadError:
            raise
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        if not self._verifies:
            return None
        checksum = zlib.crc32(buffer)
        recorded = section.checksums
        expected = self._recorded.setdefault(extent, checksum) if recorded is None else recorded[extent_id]
        return None if checksum == expected else "differs from its checksum"

    def _open(self, file: StoredFile) -> int:
        """Returns the descriptor of a file. Raises `SectionReadError` when it is not the one that it was."""
        with self._has_work:
            if file.path not in self._descriptors:
                self._descriptors[file.path] = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._descriptors[file.path]
        if not file.is_open_as(descriptor):
            raise SectionReadError(
                f"{file.path} was replaced or changed after the model was opened; load the model again"
            )
        return descriptor

    def _forget_pages(self, extent: Extent) -> None:
        """Asks the system to drop what it keeps of an extent, the pages at its ends included."""
        descriptor = self._descriptors.get(extent.file.path)
        if descriptor is None or not hasattr(os, "posix_fadvise"):
            return
        start = extent.offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(extent.offset + extent.num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


def _describe(section: Section, extent_id: int) -> str:
    extent = section.extents[extent_id]
    return f"{extent.file.path}: section {section.name} at byte {extent.offset} ({extent.num_bytes} bytes)"


def _read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [buffer], offset)
