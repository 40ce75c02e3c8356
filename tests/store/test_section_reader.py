"""Reads in flight: the urgent ones first, each verified, and every one of them ends, whatever goes wrong."""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from section_files import identify, make_buffers, write_sections

import moesys.store.reader
from moesys.errors import SectionReadError, ShapeError
from moesys.store import Extent, Read, Section, SectionReader, Urgency, find_direct_obstacle

WAIT_S = 10


@pytest.fixture
def sections(tmp_path: Path) -> dict[int, Section]:
    return write_sections(tmp_path / "weights.bin")


def read_now(reader: SectionReader, section: Section) -> bytes:
    buffers = make_buffers(section)
    read = reader.submit(section, buffers, Urgency.DEMAND)
    wait(reader, read)
    if read.error is not None:
        raise read.error
    return b"".join(buffers)


def wait(reader: SectionReader, read: Read) -> None:
    """Fails instead of hanging."""
    waiting = threading.Thread(target=reader.wait_any, args=([read],), daemon=True)
    waiting.start()
    waiting.join(WAIT_S)
    assert not waiting.is_alive(), "the read never ends"


class Gate:
    """A read function that waits until it is opened, and notes in which order it was called."""

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.offsets: list[int] = []

    def read_at(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.offsets.append(offset)
        self.entered.set()
        assert self.opened.wait(WAIT_S)
        return os.preadv(descriptor, buffers, offset)


def test_a_guess_that_becomes_a_demand_goes_before_other_guesses(sections: dict[int, Section]) -> None:
    gate = Gate()
    with SectionReader(1, read_at=gate.read_at) as reader:
        reads = [reader.submit(sections[0], make_buffers(sections[0]), Urgency.DEMAND)]
        assert gate.entered.wait(WAIT_S)
        for key, urgency in [(1, Urgency.PREFETCH), (2, Urgency.PREFETCH), (3, Urgency.DEMAND)]:
            reads.append(reader.submit(sections[key], make_buffers(sections[key]), urgency))
        reader.hurry(reads[2])
        reader.hurry(reads[0])
        gate.opened.set()
        for read in reads:
            wait(reader, read)
    assert gate.offsets == [
        extent.offset for key in (0, 3, 2, 1) for extent in sections[key].extents if extent.part_offset == 0
    ]


def test_what_waits_when_the_reader_closes_ends_with_an_error(sections: dict[int, Section]) -> None:
    gate = Gate()
    reader = SectionReader(1, read_at=gate.read_at)
    flying = reader.submit(sections[0], make_buffers(sections[0]), Urgency.DEMAND)
    queued = reader.submit(sections[1], make_buffers(sections[1]), Urgency.PREFETCH)
    assert gate.entered.wait(WAIT_S)
    waiting = threading.Thread(target=reader.wait_any, args=([queued],), daemon=True)
    waiting.start()
    closing = threading.Thread(target=reader.close, daemon=True)
    closing.start()
    waiting.join(WAIT_S)
    assert not waiting.is_alive(), "closing wakes those who wait"
    gate.opened.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    for read in (flying, queued):
        assert read.is_done
        assert isinstance(read.error, SectionReadError)
        assert "was not read: its files were closed before" in str(read.error)
    assert gate.offsets == [0]


def test_nothing_is_read_after_closing(sections: dict[int, Section]) -> None:
    reader = SectionReader(1)
    reader.close()
    reader.close()
    with pytest.raises(SectionReadError, match="the files of this model were closed"):
        reader.submit(sections[0], make_buffers(sections[0]), Urgency.DEMAND)


@pytest.mark.parametrize("error", [MemoryError("no memory"), AttributeError("no preadv"), ValueError("odd")])
def test_whatever_goes_wrong_in_a_thread_ends_the_read_and_the_thread_goes_on(
    error: Exception, sections: dict[int, Section], tmp_path: Path
) -> None:
    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise error

    with SectionReader(1, read_at=fail) as reader:
        with pytest.raises(
            SectionReadError, match=rf"section 4 at byte 160 .* {type(error).__name__}: {error}"
        ):
            read_now(reader, sections[4])
        reader._read_at = os.preadv
        assert read_now(reader, sections[4])[:40] == (tmp_path / "weights.bin").read_bytes()[160:200]


def test_advice_that_the_system_refuses_is_no_error(
    sections: dict[int, Section], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(29, "Illegal seek")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    with SectionReader(1) as reader:
        assert len(read_now(reader, sections[0])) == 64


def test_whole_pages_are_forgotten_and_each_byte_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, page = tmp_path / "pages.bin", mmap.PAGESIZE
    path.write_bytes(bytes(4 * page))
    section = Section("middle", (Extent(identify(path), page + 10, page, 0),))
    advice: list[tuple[int, int]] = []
    hashed: list[int] = []

    def note_advice(descriptor: int, offset: int, length: int, kind: int) -> None:
        if kind == os.POSIX_FADV_DONTNEED:
            advice.append((offset, length))

    def note_hash(buffer: memoryview) -> int:
        hashed.append(len(buffer))
        return 7

    monkeypatch.setattr(os, "posix_fadvise", note_advice)
    monkeypatch.setattr(moesys.store.reader.zlib, "crc32", note_hash)
    with SectionReader(1) as reader:
        read_now(reader, section)
    assert advice == [(page, 2 * page)]
    assert hashed == [page]


def test_a_section_may_bring_its_checksums(sections: dict[int, Section], tmp_path: Path) -> None:
    data = (tmp_path / "weights.bin").read_bytes()
    right = tuple(zlib.crc32(data[e.offset : e.offset + e.num_bytes]) for e in sections[0].extents)
    with SectionReader(1) as reader:
        assert read_now(reader, replace(sections[0], checksums=right))
        with pytest.raises(SectionReadError, match=r"at byte 16 .* differs from its checksum, twice"):
            read_now(reader, replace(sections[0], checksums=(right[0], right[1] ^ 1, right[2])))
    with SectionReader(1, verifies=False) as reader:
        assert read_now(reader, replace(sections[0], checksums=(0, 0, 0)))


def test_sections_of_the_same_name_do_not_share_checksums(sections: dict[int, Section]) -> None:
    with SectionReader(1) as reader:
        for key in (0, 1):
            assert len(read_now(reader, replace(sections[key], name="expert"))) == 64


def test_records_that_do_not_fit_are_refused(sections: dict[int, Section]) -> None:
    with pytest.raises(ShapeError, match="2 checksums for 3 extents"):
        replace(sections[0], checksums=(1, 2))
    with pytest.raises(ShapeError, match="has no extents"):
        Section("empty", ())
    with SectionReader(1) as reader, pytest.raises(ShapeError, match=r"\[16, 24, 24\] bytes, got \[16, 24\]"):
        reader.submit(sections[0], make_buffers(sections[0])[:2], Urgency.DEMAND)


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("change", ["replaced", "written", "shorter"])
def test_a_file_that_is_not_what_it_was_is_refused(
    change: str, is_open: bool, sections: dict[int, Section], tmp_path: Path
) -> None:
    path = tmp_path / "weights.bin"
    data = path.read_bytes()
    with SectionReader(1) as reader:
        if is_open:
            read_now(reader, sections[0])
        os.utime(path, ns=(0, 1))
        if change == "replaced":
            (tmp_path / "other").write_bytes(data)
            (tmp_path / "other").replace(path)
        elif change == "written":
            path.write_bytes(data)
        else:
            os.truncate(path, len(data) - 1)
        if change == "replaced" and is_open:
            os.utime(path)
        with pytest.raises(SectionReadError, match="was replaced or changed after the model was opened"):
            read_now(reader, sections[1])


def test_a_path_holds_wherever_the_process_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sections = write_sections(Path("weights.bin"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with SectionReader(1) as reader:
        assert len(read_now(reader, sections[0])) == 64


def test_whether_a_file_can_be_read_past_the_page_cache_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    real_open = os.open

    def refuse(name: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real_open(name, flags)

    monkeypatch.setattr("moesys.store.open_files.os.open", refuse)
    assert find_direct_obstacle(path) == "the file system refuses O_DIRECT: Invalid argument"
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        find_direct_obstacle(tmp_path / "absent")
