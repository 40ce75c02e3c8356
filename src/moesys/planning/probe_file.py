"""A file that a disk's rates are measured on: a large one of a model, or one of noise made for it.

A file made here has no name from the moment it is open, so that nothing is left behind whatever ends the process.
Knows nothing of rates.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesys.errors import ConfigError, DiskSpaceError
from moesys.store import ReadMode
from moesys.units import format_bytes

DEFAULT_BYTES = 2**30
"""Of a file that is made: large beside any disk's own memory, written in a second or two."""

_FAIR_BYTES = 512 * 2**20
"""Of a file found in a folder; a smaller one would be read again and again."""

_CHUNK_BYTES = 16 * 2**20
_SPARE_BYTES = 256 * 2**20
"""Left free on the disk."""


@dataclass(frozen=True)
class ProbeFile:
    """A file that is open for reading.

    name:             for people.
    descriptors:      by how they read.
    direct_obstacle:  why it cannot be read past the page cache; None where it can.
    """

    name: str
    num_bytes: int
    descriptors: Mapping[ReadMode, int]
    direct_obstacle: str | None = None

    def drop_pages(self) -> None:
        """Asks the system to forget what it keeps of the file."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptors[ReadMode.BUFFERED], 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def open_probe_file(path: Path, num_bytes: int = DEFAULT_BYTES) -> Iterator[ProbeFile]:
    """Opens ``path`` if it is a file, else the largest file in that folder if that is large enough and really lies on
    the disk, else a new one of ``num_bytes`` there, which is gone afterwards.

    Raises `ConfigError` where ``path`` does not exist, `DiskSpaceError` where the disk has no room, and `OSError`.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a folder or file on the disk to measure")
    found = path if path.is_file() else _find_large_file(path)
    with ExitStack() as opened:
        if found is not None:
            yield _open(found, str(found), opened)
            return
        _require_space(path, num_bytes)
        try:
            made = _make(path, num_bytes, opened)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise _report_full(path, num_bytes, shutil.disk_usage(path).free) from error
        yield made


def _find_large_file(folder: Path) -> Path | None:
    """Returns the largest file that is no mere outline: holes are read at the speed of memory."""
    files = {file: file.stat() for file in folder.iterdir() if file.is_file()}
    sizes = {
        file: status.st_size
        for file, status in files.items()
        if status.st_blocks * 512 >= status.st_size // 2
    }
    largest = max(sizes, key=sizes.__getitem__, default=None)
    return largest if largest is not None and sizes[largest] >= _FAIR_BYTES else None


def _make(folder: Path, num_bytes: int, opened: ExitStack) -> ProbeFile:
    descriptor, name = tempfile.mkstemp(prefix=".moesys-probe-", dir=folder)
    path = Path(name)
    with os.fdopen(descriptor, "wb") as file:
        try:
            probe = _open(path, f"a file of {format_bytes(num_bytes)} made in {folder}", opened, num_bytes)
        finally:
            path.unlink()
        noise = np.random.default_rng(0)
        for start in range(0, num_bytes, _CHUNK_BYTES):
            file.write(noise.bytes(min(_CHUNK_BYTES, num_bytes - start)))
        file.flush()
        os.fsync(file.fileno())
    return probe


def _open(path: Path, name: str, opened: ExitStack, num_bytes: int | None = None) -> ProbeFile:
    buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    opened.callback(os.close, buffered)
    descriptors, obstacle = {ReadMode.BUFFERED: buffered}, None
    if not hasattr(os, "O_DIRECT"):
        obstacle = "this system has no O_DIRECT"
    else:
        try:
            descriptors[ReadMode.DIRECT] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            obstacle = f"the file system refuses O_DIRECT: {error.strerror}"
        else:
            opened.callback(os.close, descriptors[ReadMode.DIRECT])
    return ProbeFile(name, num_bytes or os.fstat(buffered).st_size, descriptors, obstacle)


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPARE_BYTES:
        raise _report_full(folder, num_bytes, free)


def _report_full(folder: Path, num_bytes: int, free: int) -> DiskSpaceError:
    return DiskSpaceError(
        f"measuring the disk of {folder} needs {format_bytes(num_bytes + _SPARE_BYTES)} for a while and "
        f"{format_bytes(free)} are free; name a folder with more, or a file of {format_bytes(_FAIR_BYTES)} or more "
        "to read"
    )
