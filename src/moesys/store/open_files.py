"""The files that sections lie in, open for reading: through the system's page cache, or past it (O_DIRECT).

Knows descriptors, pages and alignment; knows nothing of sections, threads that wait, or checksums.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

import numpy as np

from moesys.errors import SectionReadError
from moesys.store.pieces import BLOCK_BYTES, PageRange
from moesys.store.stored_file import StoredFile

ReadAt = Callable[[int, Sequence[memoryview], int], int]
"""(file descriptor, buffers, offset) to the number of bytes read, like `os.preadv`."""


class ReadMode(StrEnum):
    """How bytes come from the disk. Which is faster depends on the disk; direct reads take less of the CPU."""

    BUFFERED = "buffered"
    """Through the page cache, from which they are copied."""
    DIRECT = "direct"
    """Past it: into the slot itself where file and memory are aligned to blocks, else by way of a buffer."""


def find_direct_obstacle(path: Path) -> str | None:
    """Returns why a file cannot be read past the page cache; None where it can. Raises `OSError` for a file that cannot
    be read at all."""
    os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    if not hasattr(os, "O_DIRECT"):
        return "this system has no O_DIRECT"
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
    except OSError as error:
        return f"the file system refuses O_DIRECT: {error.strerror}"
    return None


class OpenFiles:
    """Descriptors by path, opened when first needed."""

    def __init__(self, mode: ReadMode) -> None:
        self.mode = mode
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def open(self, file: StoredFile) -> int:
        """Returns the descriptor of a file. Raises `SectionReadError` when it is not the one that it was, or cannot be
        read in this mode, and `OSError` when it cannot be opened."""
        with self._lock:
            descriptor = self._descriptors.get(file.path)
            if descriptor is None:
                descriptor = self._descriptors[file.path] = self._open(file.path)
        if not file.is_open_as(descriptor):
            raise SectionReadError(
                f"{file.path} was replaced or changed after the model was opened; load the model again"
            )
        return descriptor

    def drop_pages(self, pages: PageRange) -> None:
        """Asks the system to forget what it keeps of a file; does nothing for one that is not open."""
        descriptor = self._descriptors.get(pages.file.path)
        if descriptor is not None and hasattr(os, "posix_fadvise"):
            _advise(descriptor, pages.start, pages.num_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Closes all files."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _open(self, path: Path) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if self.mode is ReadMode.BUFFERED:
            descriptor = os.open(path, flags)
            if hasattr(os, "posix_fadvise"):
                # Threads that read one file at several places confuse the system's read-ahead, which then runs past
                # what is needed; without it each request is read as a whole.
                _advise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            return descriptor
        if not hasattr(os, "O_DIRECT"):
            raise SectionReadError(
                f"{path} cannot be read in mode 'direct': this system has no O_DIRECT; use 'buffered'"
            )
        try:
            return os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            raise SectionReadError(
                f"{path} cannot be read in mode 'direct': its file system refuses it ({error.strerror}); use 'buffered'"
            ) from error


class Staging:
    """Memory of one thread, aligned to blocks, for direct reads that cannot go where they belong at once."""

    def __init__(self, piece_bytes: int) -> None:
        """piece_bytes: the most that is read at a time."""
        self._memory = memoryview(mmap.mmap(-1, self.count_bytes(piece_bytes)))

    @staticmethod
    def count_bytes(piece_bytes: int) -> int:
        """Returns the bytes that one takes."""
        return piece_bytes + 2 * BLOCK_BYTES

    def fill(self, read_at: ReadAt, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from a file that is open for direct reads; returns the bytes there were."""
        if _is_aligned(buffers, offset):
            return fill(read_at, descriptor, buffers, offset, BLOCK_BYTES)
        size = sum(map(len, buffers))
        start = offset // BLOCK_BYTES * BLOCK_BYTES
        stop = -(-(offset + size) // BLOCK_BYTES) * BLOCK_BYTES
        count = fill(read_at, descriptor, [self._memory[: stop - start]], start, BLOCK_BYTES)
        done = max(0, min(count - (offset - start), size))
        source = np.frombuffer(self._memory, np.uint8)[offset - start :][:done]
        for buffer in buffers:
            target = np.frombuffer(buffer, np.uint8)[: source.shape[0]]
            np.copyto(target, source[: target.shape[0]])
            source = source[target.shape[0] :]
        return done


def read_vector(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """See `ReadAt`."""
    return os.preadv(descriptor, buffers, offset)


def fill(
    read_at: ReadAt, descriptor: int, buffers: Sequence[memoryview], offset: int, block_bytes: int = 1
) -> int:
    """Fills buffers from a file in as many requests as it takes; returns the bytes there were until its end.

    block_bytes: a multiple at which each request must begin; one that ends elsewhere is followed by one that reads its
                 last block again.
    """
    size = sum(map(len, buffers))
    done = count = read_at(descriptor, buffers, offset)
    while count and done < size:
        begin = done // block_bytes * block_bytes
        count = read_at(descriptor, _skip(buffers, begin), offset + begin)
        if begin + count <= done:
            break
        done = begin + count
    return done


def _skip(buffers: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """Returns the buffers without their first bytes."""
    left = []
    for buffer in buffers:
        if num_bytes < len(buffer):
            left.append(buffer[num_bytes:])
        num_bytes = max(0, num_bytes - len(buffer))
    return left


def _is_aligned(buffers: Sequence[memoryview], offset: int) -> bool:
    """Whether file and memory allow a direct read without a copy."""
    return offset % BLOCK_BYTES == 0 and all(
        len(buffer) % BLOCK_BYTES == 0 and np.frombuffer(buffer, np.uint8).ctypes.data % BLOCK_BYTES == 0
        for buffer in buffers
    )


def _advise(descriptor: int, offset: int, num_bytes: int, advice: int) -> None:
    with suppress(OSError):
        # Advice is a wish; a file system that does not know it reads as it always does.
        os.posix_fadvise(descriptor, offset, num_bytes, advice)
