"""Durable writing and checked reading: the one place that changes the disk when it must survive a crash.

Knows files, folders, hashes and what the operating system can answer; knows nothing of checkpoints, tensors
or JSON. The idea: a file is only ever created new, is on the disk (fsync) before it gets a name that anybody
reads, and every system call passes one method, ``FileSystem.system_call``, so that a test can count, fail,
shorten or kill at each of them. Reading compares size and digest with what was written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from moesys.errors import CheckpointError, DamagedCheckpointError, DiskSpaceError

PIECE_BYTES = 2**20
"""Bytes hashed and then written (or read and then hashed) at a time: small enough for a core's cache."""

_LOST_CONTENTS = {errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class WrittenFile:
    """What went into a file: its size in bytes and the sha256 of its contents in hexadecimal."""

    size_bytes: int
    sha256: str


class FileSystem:
    """Durable operations on a real disk.

    Every failure is a CheckpointError that names the path and the cause; a full disk or quota is a
    DiskSpaceError that also names the bytes needed and free.
    """

    def system_call(
        self, call: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs
    ) -> _Result:
        """Performs one system call. Tests override this to inject faults."""
        return call(*args, **kwargs)

    def make_directory(self, path: Path) -> None:
        """Creates one new folder; its parent must exist and be synced by the caller."""
        with self.explained("create the folder", path):
            self.system_call(os.mkdir, path)

    def ensure_directory(self, path: Path) -> None:
        """Creates a folder and its missing ancestors durably; does nothing when it exists."""
        if path.is_dir():
            return
        self.ensure_directory(path.parent)
        self.make_directory(path)
        self.fsync_directory(path.parent)

    def write_new_file(
        self, path: Path, chunks: Iterable[bytes | memoryview], size_bytes: int
    ) -> WrittenFile:
        """Writes chunks to a file that must not exist yet, and syncs it.

        Args:
            chunks: the contents in order, as bytes or one-dimensional byte views. Each is let go before the
                next is asked for, so a generator never has two of them in memory.
            size_bytes: their total size, for the message when the disk is full.

        An fsync error is final: the file must be abandoned and written anew under another name.
        """
        with self.explained("write", path, size_bytes):
            descriptor = self.system_call(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                written = self._write_chunks(descriptor, chunks)
                self.system_call(os.fsync, descriptor)
                _drop_from_page_cache(descriptor)
            except BaseException:
                with suppress(OSError):
                    os.close(descriptor)
                raise
            self.system_call(os.close, descriptor)
        return written

    def fsync_directory(self, path: Path) -> None:
        """Makes the names in a folder (new, renamed or removed entries) durable."""
        with self.explained("sync the folder", path):
            descriptor = self.system_call(os.open, path, os.O_RDONLY)
            try:
                self.system_call(os.fsync, descriptor)
            finally:
                os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Renames a file over ``target``, or a folder to a name that is free. Atomic, not yet durable."""
        with self.explained(f"rename {source} to", target):
            self.system_call(os.rename, source, target)

    def remove_file(self, path: Path) -> None:
        """Removes a file."""
        with self.explained("remove", path):
            self.system_call(os.unlink, path)

    def remove_tree(self, path: Path) -> None:
        """Removes a folder and what is in it; links are removed, not followed."""
        with self.explained("list the folder", path):
            entries = sorted(path.iterdir())
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                self.remove_tree(entry)
            else:
                self.remove_file(entry)
        with self.explained("remove the folder", path):
            self.system_call(os.rmdir, path)

    def free_bytes(self, path: Path) -> int:
        """Returns the bytes that this user may still write to the disk that holds ``path``."""
        with self.explained("ask for the free space of", path):
            return self.system_call(shutil.disk_usage, path).free

    def _write_chunks(self, descriptor: int, chunks: Iterable[bytes | memoryview]) -> WrittenFile:
        digest = hashlib.sha256()
        size_bytes = 0
        for chunk in chunks:
            size_bytes += self._write_chunk(descriptor, memoryview(chunk), digest.update)
            del chunk
        return WrittenFile(size_bytes, digest.hexdigest())

    def _write_chunk(
        self, descriptor: int, chunk: memoryview, hash_piece: Callable[[memoryview], None]
    ) -> int:
        for start in range(0, len(chunk), PIECE_BYTES):
            piece = chunk[start : start + PIECE_BYTES]
            hash_piece(piece)
            while piece:
                taken = self.system_call(os.write, descriptor, piece)
                if taken == 0:
                    raise OSError(errno.EIO, "the disk took 0 bytes")
                piece = piece[taken:]
        return len(chunk)

    @contextmanager
    def explained(self, action: str, path: Path, needed_bytes: int = 1) -> Iterator[None]:
        """Turns an OSError of what is done inside into this class's errors: ``cannot ACTION PATH: cause``."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(f"cannot {action} {path}: {error.strerror or error}") from error
            raise DiskSpaceError(
                f"cannot {action} {path}: {error.strerror}; it needs {needed_bytes} bytes and "
                f"{self._free_text(path.parent)} bytes are free; free some space or use another disk"
            ) from error

    def _free_text(self, path: Path) -> str:
        try:
            return str(self.system_call(shutil.disk_usage, path).free)
        except OSError:
            return "an unknown number of"


DEFAULT = FileSystem()


def write_text_atomic(path: Path, text: str, files: FileSystem = DEFAULT) -> None:
    """Replaces a small UTF-8 file as `replace_file` does."""
    contents = text.encode()
    replace_file(path, [contents], len(contents), files)


def replace_file(
    path: Path, chunks: Iterable[bytes | memoryview], size_bytes: int, files: FileSystem = DEFAULT
) -> None:
    """Replaces a file so that a reader or a crash meets the old or the new contents, never a mix.

    chunks, size_bytes: as in `FileSystem.write_new_file`; the chunks may come from the old file.
    Raises CheckpointError or DiskSpaceError; the old file is then untouched, unless only the last sync of the
    folder failed.
    """
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        files.write_new_file(temporary, chunks, size_bytes)
        files.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    files.fsync_directory(path.parent)


class HashedReader:
    """Reads a file once, from front to back, and compares it with what was written; a context manager.

    Opening compares the size, ``check_digest`` the contents. A difference is a DamagedCheckpointError that
    names the file and what was expected and found.
    """

    def __init__(self, path: Path, expected: WrittenFile) -> None:
        self._path = path
        self._expected = expected
        self._digest = hashlib.sha256()
        self._left_bytes = expected.size_bytes

    def __enter__(self) -> HashedReader:
        with explain_read_errors(self._path):
            status = self._path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise DamagedCheckpointError(f"{self._path} is damaged: it is not a regular file")
            if status.st_size != self._expected.size_bytes:
                raise DamagedCheckpointError(
                    f"{self._path} is damaged: {self._expected.size_bytes} bytes were written, "
                    f"{status.st_size} bytes are there"
                )
            self._file = self._path.open("rb", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def left_bytes(self) -> int:
        """Bytes not yet read."""
        return self._left_bytes

    def read_into(self, view: memoryview) -> None:
        """Fills a one-dimensional byte view with the next bytes."""
        while view:
            piece = view[:PIECE_BYTES]
            with explain_read_errors(self._path):
                count = self._file.readinto(piece)
            if not count:
                raise DamagedCheckpointError(f"{self._path} is damaged: it ended {len(view)} bytes early")
            self._digest.update(piece[:count])
            self._left_bytes -= count
            view = view[count:]

    def read(self, num_bytes: int) -> bytes:
        """Returns the next bytes."""
        buffer = bytearray(num_bytes)
        self.read_into(memoryview(buffer))
        return bytes(buffer)

    def skip(self, num_bytes: int) -> None:
        """Reads and hashes the next bytes without keeping them."""
        scratch = memoryview(bytearray(min(num_bytes, PIECE_BYTES)))
        while num_bytes:
            piece = scratch[:num_bytes]
            self.read_into(piece)
            num_bytes -= len(piece)

    def check_digest(self) -> None:
        """Reads what is left and compares the sha256 of the whole file."""
        self.skip(self._left_bytes)
        found = self._digest.hexdigest()
        if found != self._expected.sha256:
            raise DamagedCheckpointError(
                f"{self._path} is damaged: sha256 {self._expected.sha256} was written, {found} is there"
            )

    def damaged(self, reason: str) -> DamagedCheckpointError:
        """Returns the error for contents that make no sense: the digest's, unless the digest is right."""
        try:
            self.check_digest()
        except DamagedCheckpointError as error:
            return error
        return DamagedCheckpointError(f"{self._path} is damaged: {reason}")


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a DamagedCheckpointError where contents are lost (missing, unreadable sectors),
    and into a plain CheckpointError where the system only refuses to read them now."""
    try:
        yield
    except OSError as error:
        if error.errno in _LOST_CONTENTS:
            raise DamagedCheckpointError(f"{path} is damaged: {error.strerror}") from error
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _drop_from_page_cache(descriptor: int) -> None:
    """Lets a later verification read the disk instead of the memory the file was written from."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
