"""Sections read in pieces by several threads: shared, ordered by urgency, told of, counted, and verified as a whole."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from section_files import identify, make_buffers, needs_direct_reads, write_sections

from moesys.errors import SectionReadError, ShapeError
from moesys.store import Extent, Read, Section, SectionReader, Urgency
from moesys.store.checksums import ChecksumRecord
from moesys.store.events import ReadEvent, Verification
from moesys.store.open_files import ReadMode, read_vector
from open_descriptors import list_open_files

BLOCK, WAIT_S = 4096, 10
DATA = random.Random(2).randbytes(20 * BLOCK)
MODES = [ReadMode.BUFFERED, pytest.param(ReadMode.DIRECT, marks=needs_direct_reads)]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesys.store.reader._PIECE_BYTES", BLOCK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "large.bin"
    path.write_bytes(DATA)
    return path


def make_section(path: Path, start: int, *sizes: int, name: str = "large") -> Section:
    offsets = [start + sum(sizes[:i]) for i in range(len(sizes))]
    file = identify(path)
    return Section(
        name, tuple(Extent(file, *pair, part) for part, pair in enumerate(zip(offsets, sizes, strict=True)))
    )


def finish(reader: SectionReader, *reads: Read) -> None:
    """Fails instead of hanging."""
    deadline = time.monotonic() + WAIT_S
    while not all(read.is_done for read in reads):
        assert time.monotonic() < deadline, "the read never ends"
        time.sleep(0.001)


def read_now(
    reader: SectionReader, section: Section, urgency: Urgency = Urgency.DEMAND
) -> tuple[bytes, Read]:
    buffers = make_buffers(section)
    read = reader.submit(section, buffers, urgency)
    finish(reader, read)
    if read.error is not None:
        raise read.error
    return b"".join(buffers), read


@pytest.mark.parametrize("mode", MODES)
def test_any_section_is_right_and_has_its_own_checksums(mode: ReadMode, path: Path) -> None:
    draw = random.Random(4)
    with SectionReader(4, mode=mode) as reader:
        for _ in range(60):
            sizes = [draw.choice([1, 30, BLOCK, 3 * BLOCK + 5]) for _ in range(draw.randrange(1, 5))]
            start = draw.choice([0, 8, BLOCK, 3 * BLOCK, len(DATA) - sum(sizes)])
            section = make_section(path, start, *sizes)
            expected = DATA[start : start + sum(sizes)]
            sums = tuple(zlib.crc32(DATA[e.offset : e.offset + e.num_bytes]) for e in section.extents)
            found, read = read_now(reader, replace(section, checksums=sums))
            assert found == expected
            assert read.verification is Verification.COMPARED
        assert reader.staging_bytes == (4 * 3 * BLOCK if mode is ReadMode.DIRECT else 0)


def test_a_lone_section_is_read_by_all_threads(path: Path) -> None:
    together = threading.Barrier(4, timeout=WAIT_S)

    def meet(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        together.wait()
        return read_vector(descriptor, buffers, offset)

    with SectionReader(4, read_at=meet) as reader:
        assert read_now(reader, make_section(path, 0, 8 * BLOCK))[0] == DATA[: 8 * BLOCK]


def test_a_guess_under_way_delays_a_demand_by_one_piece(path: Path) -> None:
    opened, entered = threading.Event(), threading.Event()
    offsets: list[int] = []

    def note(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        offsets.append(offset // BLOCK)
        entered.set()
        assert opened.wait(WAIT_S)
        return read_vector(descriptor, buffers, offset)

    guess, demand = make_section(path, 0, 4 * BLOCK), make_section(path, 10 * BLOCK, BLOCK, BLOCK)
    with SectionReader(1, read_at=note) as reader:
        first = reader.submit(guess, make_buffers(guess), Urgency.PREFETCH)
        assert entered.wait(WAIT_S)
        second = reader.submit(demand, make_buffers(demand), Urgency.DEMAND)
        opened.set()
        finish(reader, first, second)
    assert offsets == [0, 10, 11, 1, 2, 3]


def test_each_section_is_told_of_once_with_its_times(path: Path) -> None:
    events: list[tuple[ReadEvent, bool, str]] = []
    opened, entered = threading.Event(), threading.Event()

    def wait_for_it(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        entered.set()
        assert opened.wait(WAIT_S)
        if offset == 8 * BLOCK:
            raise OSError(5, "Input/output error")
        return read_vector(descriptor, buffers, offset)

    def note(event: ReadEvent) -> None:
        is_free = reader._has_work.acquire(timeout=WAIT_S)
        reader._has_work.release()
        events.append((event, is_free, threading.current_thread().name))

    start_s = time.perf_counter()
    reader = SectionReader(1, read_at=wait_for_it, on_read=note)
    sections = [make_section(path, i * 4 * BLOCK, 2 * BLOCK, name=f"section {i}") for i in range(4)]
    reads = [reader.submit(sections[0], make_buffers(sections[0]), Urgency.DEMAND)]
    assert entered.wait(WAIT_S)
    reads += [reader.submit(section, make_buffers(section), Urgency.PREFETCH) for section in sections[1:]]
    reader.hurry(reads[2])
    opened_s = time.perf_counter()
    opened.set()
    finish(reader, *reads)
    assert len(events) == 4, "nobody learns that a read is done before it is told of"
    opened.clear()
    entered.clear()
    flying = reader.submit(sections[0], make_buffers(sections[0]), Urgency.PREFETCH)
    queued = reader.submit(sections[1], make_buffers(sections[1]), Urgency.PREFETCH)
    assert entered.wait(WAIT_S)
    closing = threading.Thread(target=reader.close)
    closing.start()
    finish(reader, queued)
    opened.set()
    closing.join(WAIT_S)
    finish(reader, flying)
    assert [(event.section, event.urgency, event.failed) for event, _, _ in events] == [
        ("section 0", Urgency.DEMAND, False),
        ("section 2", Urgency.DEMAND, True),
        ("section 1", Urgency.PREFETCH, False),
        ("section 3", Urgency.PREFETCH, False),
        ("section 1", Urgency.PREFETCH, True),
        ("section 0", Urgency.PREFETCH, True),
    ]
    times = [start_s, *(event.finished_s for event, _, _ in events), time.perf_counter()]
    assert times == sorted(times)
    for event, is_free, thread in events:
        assert is_free, "not under the lock"
        assert thread.startswith("moesys-read") == (event is not events[4][0])
        assert event.num_bytes == 2 * BLOCK
        assert start_s <= event.queued_s <= event.started_s <= event.finished_s
    assert events[0][0].queued_s <= events[0][0].started_s < opened_s < events[0][0].finished_s
    assert events[2][0].queued_s < opened_s
    assert events[2][0].started_s >= events[1][0].finished_s, "one thread reads one after the other"
    assert events[4][0].started_s == events[4][0].finished_s, "it never started"


def test_who_is_told_and_fails_fails_the_read_and_not_the_reader(path: Path) -> None:
    def fail(event: ReadEvent) -> None:
        raise ValueError("no trace")

    with SectionReader(1, on_read=fail) as reader:
        for _ in range(2):
            with pytest.raises(SectionReadError, match=r"on_read of section large .* ValueError: no trace"):
                read_now(reader, make_section(path, 0, BLOCK))


def test_what_the_system_may_keep_is_counted_in_whole_pages(path: Path) -> None:
    seen: list[int] = []

    def note(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        seen.append(reader.page_cache_bytes)
        return read_vector(descriptor, buffers, offset)

    page = mmap.PAGESIZE
    sections = [make_section(path, start, 100, page) for start in (0, 4 * page, 7 * page + page // 2)]
    for keeps, expected in [(False, 0), (True, 6 * page)]:
        seen.clear()
        reader = SectionReader(1, keeps_pages=keeps, read_at=note)
        for section in (sections[0], *sections):
            read_now(reader, replace(section, name="large"))
        reader.close()
        assert reader.page_cache_bytes == expected
        assert max(seen) == max(expected, 2 * page)
    with pytest.raises(ShapeError, match="drop keeps_pages or read buffered"):
        SectionReader(1, mode=ReadMode.DIRECT, keeps_pages=True)


@needs_direct_reads
def test_direct_reads_leave_nothing_in_the_page_cache(path: Path) -> None:
    with SectionReader(1, mode=ReadMode.DIRECT) as reader:
        read_now(reader, make_section(path, 5, BLOCK))
        assert reader.page_cache_bytes == 0


def test_bytes_once_read_are_verified_by_the_next_run_from_its_first_read_on(
    tmp_path: Path, path: Path
) -> None:
    section = make_section(path, 0, 3 * BLOCK, 10)
    with SectionReader(2, checksums=ChecksumRecord(tmp_path / "kept")) as reader:
        kinds = [read_now(reader, section)[1].verification for _ in range(2)]
    assert kinds == [Verification.RECORDED, Verification.COMPARED]
    status = path.stat()
    path.write_bytes(DATA[:9] + bytes([DATA[9] ^ 1]) + DATA[10:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with SectionReader(2, checksums=ChecksumRecord(tmp_path / "kept")) as reader:
        (record,) = (tmp_path / "kept").iterdir()
        with pytest.raises(
            SectionReadError, match=f"section large at byte 0 .* twice; .* delete {record}, where an"
        ):
            read_now(reader, section)
    os.utime(path)
    changed = make_section(path, 0, 3 * BLOCK, 10)
    with SectionReader(2, checksums=ChecksumRecord(tmp_path / "kept")) as reader:
        assert read_now(reader, changed)[1].verification is Verification.RECORDED


def test_a_reader_that_does_not_verify_says_so(path: Path) -> None:
    with SectionReader(1, verifies=False) as reader:
        section = replace(make_section(path, 0, BLOCK), checksums=(1,))
        assert read_now(reader, section)[1].verification is Verification.SKIPPED


def test_only_the_pieces_of_what_differs_are_read_again(path: Path) -> None:
    offsets: list[int] = []

    def read_badly(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        offsets.append(offset // BLOCK)
        count = read_vector(descriptor, buffers, offset)
        if offsets == [0, 1, 2, 3]:
            buffers[-1][0] ^= 1
        return count

    section = make_section(path, 0, BLOCK, BLOCK, 2 * BLOCK)
    sums = tuple(zlib.crc32(DATA[e.offset : e.offset + e.num_bytes]) for e in section.extents)
    with SectionReader(1, read_at=read_badly) as reader:
        assert read_now(reader, replace(section, checksums=sums))[0] == DATA[: 4 * BLOCK]
    assert offsets == [0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize("verifies", [True, False])
def test_a_file_that_is_written_while_it_is_read_is_noticed_at_its_first_read(
    verifies: bool, path: Path
) -> None:
    def write_meanwhile(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = read_vector(descriptor, buffers, offset)
        os.utime(path, ns=(0, 1))
        return count

    section = make_section(path, 0, BLOCK)
    with (
        SectionReader(1, verifies=verifies, read_at=write_meanwhile) as reader,
        pytest.raises(SectionReadError, match=r"large\.bin was replaced or changed"),
    ):
        read_now(reader, section)


def test_a_repetition_that_meets_a_closed_reader_ends(path: Path) -> None:
    section = replace(make_section(path, 0, BLOCK), checksums=(1,))
    closing = threading.Thread(target=lambda: reader.close())

    def close_meanwhile(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        closing.start()
        while not reader._is_closed:
            time.sleep(0.001)
        return read_vector(descriptor, buffers, offset)

    reader = SectionReader(1, read_at=close_meanwhile)
    with pytest.raises(SectionReadError, match="its files were closed before"):
        read_now(reader, section)
    closing.join(WAIT_S)
    assert not closing.is_alive()


def test_a_reader_needs_a_thread(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="at least 1 thread, got 0"):
        SectionReader(0)


def test_threads_end_and_descriptors_are_closed(tmp_path: Path) -> None:
    sections = write_sections(tmp_path / "weights.bin")
    threads = threading.active_count()
    with SectionReader(3) as reader:
        for section in sections.values():
            read_now(reader, section)
        assert threading.active_count() == threads + 3
        assert list_open_files(tmp_path) == [str((tmp_path / "weights.bin").resolve())]
    assert threading.active_count() == threads
    assert not list_open_files(tmp_path)


@pytest.mark.parametrize("fault", ["ends", "differs"])
def test_what_is_read_again_comes_from_the_disk(
    fault: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def read_badly(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        is_first = not log
        log.append("read")
        count = read_vector(descriptor, buffers, offset)
        if is_first and fault == "differs":
            buffers[0][0] ^= 1
        return 0 if is_first and fault == "ends" else count

    def note(descriptor: int, offset: int, num_bytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            log.append(f"drop {num_bytes} from {offset}")

    monkeypatch.setattr(os, "posix_fadvise", note)
    section = make_section(path, BLOCK + 10, 100)
    sums = (zlib.crc32(DATA[BLOCK + 10 : BLOCK + 110]),)
    with SectionReader(1, read_at=read_badly) as reader:
        read_now(reader, replace(section, checksums=sums))
    drop = f"drop {mmap.PAGESIZE} from {BLOCK}"
    assert log == ["read", drop, "read", drop]


@pytest.mark.parametrize("verifies", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_section_beyond_the_end_of_its_file_is_noticed_at_its_first_read(
    mode: ReadMode, verifies: bool, path: Path
) -> None:
    section = make_section(path, len(DATA) - 50, 100)
    with (
        SectionReader(1, mode=mode, verifies=verifies) as reader,
        pytest.raises(SectionReadError, match=rf"at byte {len(DATA)} \(50 bytes\) ends after 0 bytes, twice"),
    ):
        read_now(reader, section)


def test_what_is_known_of_a_section_in_part_is_compared(path: Path) -> None:
    record, section = ChecksumRecord(), make_section(path, 0, 100, 200)
    record.note(section.extents[0], zlib.crc32(DATA[:100]) ^ 1)
    with (
        SectionReader(1, checksums=record) as reader,
        pytest.raises(SectionReadError, match=r"at byte 0 \(100 bytes\) differs from its checksum, twice"),
    ):
        read_now(reader, section)
