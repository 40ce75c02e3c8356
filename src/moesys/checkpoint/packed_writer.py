"""A packed file being written: parts in any order, a header at the end, a name when all of it is on the disk.

Knows bytes, places and checksums; knows nothing of models. Nobody ever meets half a file: it is written under another
name beside the final one and renamed, or removed whatever ends the writing.
"""

from __future__ import annotations

import errno
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from moesys.checkpoint.files import FileSystem
from moesys.checkpoint.packed_header import PackedHeader
from moesys.checkpoint.packed_outline import PackedTensor
from moesys.checkpoint.safetensors_file import view_bytes
from moesys.errors import DiskSpaceError
from moesys.units import format_bytes

_PIECE_BYTES = 8 * 2**20


class PackedFileWriter:
    """Writes the tensors of one file, each once. Made by `write_packed_file`."""

    def __init__(
        self,
        path: Path,
        descriptor: int,
        header: PackedHeader,
        tensors: Mapping[str, PackedTensor],
        files: FileSystem,
    ) -> None:
        self._path = path
        self._descriptor = descriptor
        self._header = header
        self._tensors = tensors
        self._files = files
        self._checksums: dict[str, tuple[int, ...]] = {}
        self._offsets: dict[str, int] = {}
        end = len(header.encode())
        for name, tensor in tensors.items():
            self._offsets[name] = end
            end += tensor.record.size_bytes
        self.num_bytes = end
        """Of the whole file."""

    def write(self, name: str, parts: Sequence[Tensor]) -> None:
        """Writes a tensor: one contiguous tensor on the CPU for each of its parts. Raises `CheckpointError`."""
        self.write_bytes(name, [view_bytes(part) for part in parts])

    def write_bytes(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Writes a tensor, the bytes of each of its parts given. Raises `CheckpointError`."""
        assert name not in self._checksums
        for place, part in zip(self._tensors[name].parts, parts, strict=True):
            assert len(part) == place.num_bytes
            self._write_at(memoryview(part), self._offsets[name] + place.offset)
        self._checksums[name] = tuple(zlib.crc32(part) for part in parts)

    def reserve(self) -> None:
        """Gives the file its size; what is not written stays zeros. Raises `CheckpointError`."""
        with self._explained():
            self._files.system_call(os.ftruncate, self._descriptor, self.num_bytes)

    def finish(self) -> None:
        """Writes the header, with the checksums of what was written, and syncs the file. Raises `CheckpointError`."""
        checksums = {name: self._checksums[name] for name in self._tensors}
        self._write_at(memoryview(replace(self._header, checksums=checksums).encode()), 0)
        with self._explained():
            self._files.system_call(os.fsync, self._descriptor)

    def _write_at(self, contents: memoryview, offset: int) -> None:
        with self._explained():
            while contents:
                taken = self._files.system_call(os.pwrite, self._descriptor, contents[:_PIECE_BYTES], offset)
                if not taken:
                    raise OSError(errno.EIO, "the disk took 0 bytes")
                contents, offset = contents[taken:], offset + taken

    def _explained(self) -> AbstractContextManager[None]:
        return self._files.explained("write", self._path, self.num_bytes)


@contextmanager
def write_packed_file(
    path: Path, header: PackedHeader, tensors: Mapping[str, PackedTensor], files: FileSystem
) -> Iterator[PackedFileWriter]:
    """Gives a writer; a file of its name takes the place of another only when nothing was raised inside.

    header: with any checksums of the right number; they are replaced. tensors: those of the header, with their parts.
    Raises `CheckpointError`, and `DiskSpaceError` at once where the disk has not enough space; nothing is left then.
    """
    path = path.absolute()
    draft = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with files.explained("write", path):
            descriptor = files.system_call(os.open, draft, flags, 0o666)
        try:
            writer = PackedFileWriter(path, descriptor, header, tensors, files)
            _require_space(path, writer.num_bytes, files)
            writer.reserve()
            yield writer
            writer.finish()
        finally:
            os.close(descriptor)
        files.rename(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    files.fsync_directory(path.parent)


def _require_space(path: Path, needed_bytes: int, files: FileSystem) -> None:
    free_bytes = files.free_bytes(path.parent)
    if free_bytes < needed_bytes:
        raise DiskSpaceError(
            f"cannot write {path}: it needs {format_bytes(needed_bytes)} and {format_bytes(free_bytes)} are free; free "
            f"{format_bytes(needed_bytes - free_bytes)} or use another disk"
        )
