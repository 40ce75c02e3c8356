"""Bytes from the disk in both modes: whatever the alignment, and whatever a request leaves over."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from section_files import identify, needs_direct_reads

from moesys.errors import SectionReadError
from moesys.store.open_files import OpenFiles, ReadMode, Staging, fill, read_vector
from moesys.store.pieces import BLOCK_BYTES, PageRange

SIZE = 5 * BLOCK_BYTES + 77
DATA = random.Random(5).randbytes(SIZE)
PIECE = 3 * BLOCK_BYTES


def make_reading(limits: Sequence[int]) -> Callable[[int, Sequence[memoryview], int], int]:
    """Reads of `DATA` of which the first ones end after so many bytes."""
    left = list(limits)

    def read_at(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        limit = left.pop(0) if left else SIZE
        source = DATA[offset : offset + limit]
        done = 0
        for buffer in buffers:
            part = source[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    return read_at


@given(st.integers(0, SIZE - 1), st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.data())
def test_short_reads_are_continued_until_the_end_of_the_file(
    offset: int, sizes: list[int], data: st.DataObject
) -> None:
    limits = data.draw(st.lists(st.integers(1, 5000), max_size=3))
    buffers = [memoryview(bytearray(size)) for size in sizes]
    done = fill(make_reading(limits), 0, buffers, offset)
    assert done == min(sum(sizes), SIZE - offset)
    assert b"".join(buffers)[:done] == DATA[offset : offset + done]


@given(st.integers(0, SIZE - 1), st.lists(st.integers(1, 3000), min_size=1, max_size=4), st.data())
def test_staging_gives_the_bytes_that_were_asked_for(
    offset: int, sizes: list[int], data: st.DataObject
) -> None:
    limits = data.draw(st.lists(st.integers(BLOCK_BYTES, 3 * BLOCK_BYTES), max_size=3))
    buffers = [memoryview(bytearray(size)) for size in sizes]
    read_at = make_reading(limits)

    def read_aligned(descriptor: int, buffers: Sequence[memoryview], start: int) -> int:
        assert start % BLOCK_BYTES == 0
        return read_at(descriptor, buffers, start)

    done = Staging(PIECE).fill(read_aligned, 0, buffers, offset)
    assert done == min(sum(sizes), SIZE - offset)
    assert b"".join(buffers)[:done] == DATA[offset : offset + done]


@needs_direct_reads
def test_direct_reads_go_to_aligned_memory_without_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(DATA)
    memory = memoryview(mmap.mmap(-1, PIECE))
    targets: list[bool] = []

    def note(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        targets.append(buffers[0].obj is memory.obj)
        return read_vector(descriptor, buffers, offset)

    files = OpenFiles(ReadMode.DIRECT)
    descriptor = files.open(identify(path))
    try:
        for offset, start, size in [
            (BLOCK_BYTES, 0, PIECE),
            (7, 0, 100),
            (BLOCK_BYTES, 5, BLOCK_BYTES),
            (0, 0, 10),
        ]:
            buffer = memory[start : start + size]
            assert Staging(PIECE).fill(note, descriptor, [buffer], offset) == size
            assert buffer == DATA[offset : offset + size]
        assert targets == [True, False, False, False]
        tail = memory[: 2 * BLOCK_BYTES]
        assert Staging(PIECE).fill(note, descriptor, [tail], 4 * BLOCK_BYTES) == BLOCK_BYTES + 77
        assert tail[: BLOCK_BYTES + 77] == DATA[4 * BLOCK_BYTES :]
    finally:
        files.close()


def test_a_file_system_that_refuses_direct_reads_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(DATA)
    file, open_file = identify(path), os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return open_file(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    files = OpenFiles(ReadMode.DIRECT)
    with pytest.raises(
        SectionReadError, match=r"'direct': its file system refuses it \(Invalid arg.*use 'buffered'"
    ):
        files.open(file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_file)
        path.unlink()
        with pytest.raises(FileNotFoundError):
            files.open(file)
    monkeypatch.delattr(os, "O_DIRECT")
    with pytest.raises(SectionReadError, match="this system has no O_DIRECT; use 'buffered'"):
        files.open(file)


def test_pages_of_a_file_that_is_not_open_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(DATA)
    advice: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *asked: advice.append(asked))
    files = OpenFiles(ReadMode.BUFFERED)
    pages = PageRange(identify(path), 4096, 12288)
    files.drop_pages(pages)
    assert advice == []
    files.open(pages.file)
    files.drop_pages(pages)
    files.close()
    assert advice == [(0, 0, os.POSIX_FADV_RANDOM), (4096, 8192, os.POSIX_FADV_DONTNEED)]
    files.drop_pages(pages)
    assert len(advice) == 2
