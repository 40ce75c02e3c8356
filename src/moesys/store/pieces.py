"""A section cut into requests for the disk: what lies together is read together, what is large in several pieces.

Pure arithmetic on extents; knows nothing of threads, descriptors or memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moesys.store.section import Extent, Section
from moesys.store.stored_file import StoredFile

BLOCK_BYTES = 4096
"""Pieces begin and end at multiples of it in the file, wherever the section's own ends allow."""

_MAX_SLICES = 1024
"""Buffers that one `os.preadv` takes on Linux (IOV_MAX)."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes ``start`` to ``stop`` of an extent of a section."""

    extent_id: int
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Piece:
    """One request: slices that lie one after the other in a file, from ``offset`` on."""

    file: StoredFile
    offset: int
    slices: tuple[Slice, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.slices)


@dataclass(frozen=True, slots=True)
class PageRange:
    """Whole pages of a file, as the system's page cache keeps them."""

    file: StoredFile
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def cut_section(section: Section, piece_bytes: int) -> list[Piece]:
    """Returns what is to be read, in the order of the files, at most ``piece_bytes`` and a block at a time."""
    return [piece for run in _find_runs(section) for piece in _cut_run(section, run, piece_bytes)]


def list_pages(section: Section) -> list[PageRange]:
    """Returns the pages that a section touches, one range for each run of neighbouring extents."""
    return [round_to_pages(section.extents[run[0]], section.extents[run[-1]]) for run in _find_runs(section)]


def round_to_pages(first: Extent, last: Extent) -> PageRange:
    """Returns the pages from the first byte of one extent to the last of another in the same file."""
    start = first.offset // mmap.PAGESIZE * mmap.PAGESIZE
    stop = -(-(last.offset + last.num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    return PageRange(first.file, start, stop)


def _find_runs(section: Section) -> list[list[int]]:
    """Groups extents, by number, that follow each other in a file."""
    extents = section.extents
    order = sorted(range(len(extents)), key=lambda i: (str(extents[i].file.path), extents[i].offset))
    runs: list[list[int]] = []
    for extent_id in order:
        extent = extents[extent_id]
        last = extents[runs[-1][-1]] if runs else None
        if last is not None and last.file == extent.file and last.offset + last.num_bytes == extent.offset:
            runs[-1].append(extent_id)
        else:
            runs.append([extent_id])
    return runs


def _cut_run(section: Section, run: Sequence[int], piece_bytes: int) -> Iterator[Piece]:
    offset = section.extents[run[0]].offset
    limit = _find_limit(offset, piece_bytes)
    begin, slices = offset, list[Slice]()
    for extent_id in run:
        extent = section.extents[extent_id]
        start = 0
        while start < extent.num_bytes:
            if offset == limit or len(slices) == _MAX_SLICES:
                yield Piece(extent.file, begin, tuple(slices))
                begin, slices, limit = offset, [], _find_limit(offset, piece_bytes)
            stop = min(extent.num_bytes, start + limit - offset)
            slices.append(Slice(extent_id, start, stop))
            offset += stop - start
            start = stop
    yield Piece(section.extents[run[0]].file, begin, tuple(slices))


def _find_limit(offset: int, piece_bytes: int) -> int:
    return offset // BLOCK_BYTES * BLOCK_BYTES + piece_bytes
