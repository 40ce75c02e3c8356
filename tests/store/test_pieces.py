"""A section in pieces: every byte once, in requests as large as they may be."""

from __future__ import annotations

import zlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.errors import ShapeError
from moesys.store import Extent, Section, StoredFile
from moesys.store.crc32 import combine_crc32
from moesys.store.pieces import BLOCK_BYTES, cut_section, list_pages

FILES = [StoredFile(Path(f"/weights-{i}"), 1, i, 10**9, 0) for i in range(2)]
RUNS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, 3 * BLOCK_BYTES),
        st.lists(st.integers(1, 3 * BLOCK_BYTES), min_size=1),
    ),
    min_size=1,
    max_size=4,
)


def make_section(runs: list[tuple[int, int, list[int]]]) -> Section:
    """Runs of neighbouring extents, with a gap before each; the last extent comes first, so that order is none."""
    extents, ends = list[Extent](), [0, 0]
    for number, gap, sizes in runs:
        ends[number] += gap + 1
        for size in sizes:
            extents.append(Extent(FILES[number], ends[number], size, len(extents)))
            ends[number] += size
    return Section("some", (extents[-1], *extents[:-1]))


@given(RUNS, st.integers(1, 4))
def test_every_byte_is_in_one_piece_and_no_piece_could_be_larger(
    runs: list[tuple[int, int, list[int]]], num_blocks: int
) -> None:
    section, most = make_section(runs), num_blocks * BLOCK_BYTES
    pieces = cut_section(section, most)
    read = [list[tuple[int, int]]() for _ in section.extents]
    for piece in pieces:
        assert 0 < piece.num_bytes <= most
        offset = piece.offset
        for part in piece.slices:
            extent = section.extents[part.extent_id]
            assert part.num_bytes > 0
            assert (extent.file, extent.offset + part.start) == (piece.file, offset)
            read[part.extent_id].append((part.start, part.stop))
            offset += part.num_bytes
    for extent, parts in zip(section.extents, read, strict=True):
        bounds = [0, *(stop for _, stop in sorted(parts))]
        assert sorted(parts) == list(pairwise(bounds))
        assert bounds[-1] == extent.num_bytes
    for before, after in pairwise(pieces):
        if before.file == after.file and before.offset + before.num_bytes == after.offset:
            assert after.offset % BLOCK_BYTES == 0
            assert before.offset // BLOCK_BYTES * BLOCK_BYTES + most == after.offset


def test_neighbours_are_one_request_and_a_long_one_is_cut_at_blocks() -> None:
    section = make_section([(0, 99, [50, 20_000, 30]), (0, 1, [7]), (1, 0, [9])])
    pieces = cut_section(section, 2 * BLOCK_BYTES)
    assert [(piece.file, piece.offset, piece.num_bytes) for piece in pieces] == [
        (FILES[0], 100, 8092),
        (FILES[0], 8192, 8192),
        (FILES[0], 16384, 3796),
        (FILES[0], 20182, 7),
        (FILES[1], 1, 9),
    ]
    assert [(pages.start, pages.stop) for pages in list_pages(section)] == [
        (0, 20480),
        (16384, 20480),
        (0, 4096),
    ]


def test_a_request_has_no_more_buffers_than_the_system_takes() -> None:
    section = make_section([(0, 0, [1] * 2500)])
    assert [len(piece.slices) for piece in cut_section(section, 2**20)] == [1024, 1024, 452]


def test_an_empty_extent_is_refused() -> None:
    with pytest.raises(ShapeError, match="section some has an extent of 0 bytes"):
        Section("some", (Extent(FILES[0], 0, 0, 0),))


@given(st.lists(st.binary(max_size=300) | st.integers(0, 70_000).map(bytes), max_size=6))
def test_checksums_of_parts_make_that_of_the_whole(parts: list[bytes]) -> None:
    assert combine_crc32([(zlib.crc32(part), len(part)) for part in parts]) == zlib.crc32(b"".join(parts))


def test_extents_that_share_bytes_are_requests_of_their_own() -> None:
    section = Section(
        "some", tuple(Extent(FILES[0], offset, 10, part) for part, offset in enumerate((0, 5, 5, 15)))
    )
    assert [(piece.offset, piece.num_bytes) for piece in cut_section(section, BLOCK_BYTES)] == [
        (0, 10),
        (5, 10),
        (5, 20),
    ]
