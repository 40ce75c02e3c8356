"""Faults by the thousand: short, failing, slow and corrupted reads, changed files, closing, Ctrl-C. No byte that is
handed out is wrong, nobody waits for ever, and nothing stays open."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from section_files import fetch, identify, needs_direct_reads

from moesys.errors import SectionReadError
from moesys.store import (
    Extent,
    LeastRecent,
    PartShape,
    Section,
    SectionCache,
    SectionReader,
    SlotPool,
    StoredFile,
    Urgency,
)
from moesys.store.checksums import ChecksumRecord
from moesys.store.open_files import ReadMode, read_vector
from open_descriptors import list_open_files

BLOCK, NUM_SECTIONS, WAIT_S = 4096, 10, 10
PARTS = (2 * BLOCK, BLOCK, 300)
SIZE = sum(PARTS)
DATA = random.Random(9).randbytes(NUM_SECTIONS * SIZE)
NUM_FAULTS = 200
"""Of each of the dozen ways of reading below."""

MODES = [ReadMode.BUFFERED, pytest.param(ReadMode.DIRECT, marks=needs_direct_reads)]
ReadAt = Callable[[int, Sequence[memoryview], int], int]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesys.store.reader._PIECE_BYTES", BLOCK)


@pytest.fixture(autouse=True)
def _nothing_stays_open(tmp_path: Path) -> object:
    threads = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads
    assert not list_open_files(tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(DATA)
    return path


def list_sections(file: StoredFile, *, is_coalesced: bool, has_checksums: bool) -> dict[int, Section]:
    """Sections whose parts lie together, or each in a place of its own; the file holds the same bytes for both."""
    sections = {}
    for key in range(NUM_SECTIONS):
        extents, begin = [], 0
        for part, size in enumerate(PARTS):
            offset = key * SIZE + begin if is_coalesced else begin * NUM_SECTIONS + key * size
            extents.append(Extent(file, offset, size, part))
            begin += size
        sums = tuple(zlib.crc32(DATA[e.offset : e.offset + e.num_bytes]) for e in extents)
        sections[key] = Section(f"section {key}", tuple(extents), sums if has_checksums else None)
    return sections


def list_expected(section: Section) -> list[bytes]:
    return [DATA[extent.offset : extent.offset + extent.num_bytes] for extent in section.extents]


def make_cache(
    sections: dict[int, Section], reader: SectionReader, num_slots: int = 3
) -> SectionCache[SlotPool]:
    pool = SlotPool(num_slots, [PartShape((size,), torch.uint8) for size in PARTS])
    return SectionCache(pool, sections, reader, LeastRecent())


class Faults:
    """A read function that goes wrong in every way, with a certain probability."""

    def __init__(self, probability: float) -> None:
        self.probability, self.count = probability, 0
        self._draw, self._lock = random.Random(7), threading.Lock()

    def read_at(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            is_bad, kind, place = (
                self._draw.random() < self.probability,
                self._draw.randrange(6),
                self._draw.random(),
            )
            self.count += is_bad
        if not is_bad:
            return read_vector(descriptor, buffers, offset)
        match kind:
            case 0:
                raise OSError(5, "Input/output error")
            case 1:
                return 0
            case 2:
                return read_vector(descriptor, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)
            case 3:
                raise MemoryError("no memory")
            case 4:
                time.sleep(0.002)
                return read_vector(descriptor, buffers, offset)
        count = read_vector(descriptor, buffers, offset)
        buffers[-1][int(place * len(buffers[-1]))] ^= 1 << int(place * 1000) % 8
        return count


@pytest.mark.parametrize("known", ["by the file", "by an earlier run", "by the first read"])
@pytest.mark.parametrize("is_coalesced", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_random_faults_give_right_bytes_or_an_error(
    mode: ReadMode, is_coalesced: bool, known: str, path: Path, tmp_path: Path
) -> None:
    sections = list_sections(identify(path), is_coalesced=is_coalesced, has_checksums=known == "by the file")
    record, draw, faults = ChecksumRecord(tmp_path / "kept"), random.Random(3), Faults(0.0)
    if known == "by an earlier run":
        with SectionReader(2, checksums=record) as reader:
            make_cache(sections, reader).pin_resident([0, 1])
            for key in sections:
                fetch(make_cache(sections, reader), key)
        record = ChecksumRecord(tmp_path / "kept")
    with SectionReader(3, mode=mode, checksums=record, read_at=faults.read_at) as reader:
        cache = make_cache(sections, reader)
        if known == "by the first read":
            for key in sections:
                assert fetch(cache, key) == list_expected(sections[key])
        faults.probability = 0.15
        errors, num_right = list[str](), 0
        while faults.count < NUM_FAULTS:
            key, guess = draw.randrange(NUM_SECTIONS), draw.randrange(NUM_SECTIONS)
            if not cache.is_here(guess):
                cache.prefetch(guess)
            try:
                assert fetch(cache, key) == list_expected(sections[key])
                num_right += 1
            except SectionReadError as error:
                errors.append(str(error))
        assert len(errors) > 3
        assert all(f"{path}: section section" in error for error in errors)
        assert num_right > 20
        faults.probability = 0.0
        for key in sections:
            while True:
                try:
                    assert fetch(cache, key) == list_expected(sections[key])
                    break
                except SectionReadError:
                    """A guess that had failed before."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", ["replaced", "written", "shorter"])
def test_a_file_that_changes_under_us_gives_no_byte_of_the_new_one(
    change: str, mode: ReadMode, path: Path, tmp_path: Path
) -> None:
    num_errors = 0
    for round_ in range(5):
        path.write_bytes(DATA)
        time.sleep(0.01)  # A change in the same tick of an old kernel's clock has the same time.
        sections = list_sections(identify(path), is_coalesced=True, has_checksums=False)
        changes = threading.Event()

        def read_at(
            descriptor: int, buffers: Sequence[memoryview], offset: int, changes: threading.Event = changes
        ) -> int:
            count = read_vector(descriptor, buffers, offset)
            changes.set()
            return count

        def make_change(changes: threading.Event = changes, round_: int = round_) -> None:
            assert changes.wait(WAIT_S)
            time.sleep(0.0003 * round_)
            if change == "replaced":
                (tmp_path / "other").write_bytes(bytes(len(DATA)))
                (tmp_path / "other").replace(path)
            elif change == "written":
                path.write_bytes(bytes(len(DATA)))
            else:
                os.truncate(path, len(DATA) // 3)

        changing = threading.Thread(target=make_change)
        with SectionReader(2, mode=mode, read_at=read_at) as reader:
            cache = make_cache(sections, reader)
            changing.start()
            for key in [*sections, *sections]:
                try:
                    assert fetch(cache, key) == list_expected(sections[key])
                except SectionReadError:
                    num_errors += 1
            changing.join(WAIT_S)
    assert change == "replaced" or num_errors > 0, (
        "a file that is open stays what it is when another takes its name"
    )


@pytest.mark.parametrize("mode", MODES)
def test_closing_in_mid_transfer_ends_every_read(mode: ReadMode, path: Path) -> None:
    sections, draw = list_sections(identify(path), is_coalesced=True, has_checksums=True), random.Random(5)
    faults, num_errors, num_right = Faults(0.3), 0, 0
    for _ in range(40):
        reader = SectionReader(2, mode=mode, read_at=faults.read_at)
        buffers = [[memoryview(bytearray(size)) for size in PARTS] for _ in sections]
        reads = [reader.submit(sections[key], buffers[key], Urgency(key % 2)) for key in sections]
        time.sleep(draw.random() * 0.004)
        reader.close()
        for key, read in enumerate(reads):
            assert read.is_done
            num_errors += read.error is not None
            if read.error is None:
                assert [bytes(buffer) for buffer in buffers[key]] == list_expected(sections[key])
                num_right += 1
    assert num_errors > 20
    assert num_right > 20


def test_ctrl_c_while_waiting_leaves_a_cache_that_works(path: Path) -> None:
    sections = list_sections(identify(path), is_coalesced=True, has_checksums=False)
    opened, is_slow = threading.Event(), True

    def read_slowly(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert not is_slow or opened.wait(WAIT_S)
        return read_vector(descriptor, buffers, offset)

    def interrupt() -> None:
        time.sleep(0.02)
        signal.pthread_kill(main, signal.SIGINT)

    main = threading.get_ident()
    with SectionReader(2, read_at=read_slowly) as reader:
        cache = make_cache(sections, reader, num_slots=2)
        for key in (0, 1, 2):
            opened.clear()
            pressing = threading.Thread(target=interrupt)
            pressing.start()
            with pytest.raises(KeyboardInterrupt):
                fetch(cache, key)
            pressing.join(WAIT_S)
            opened.set()
            cache.settle([key])
        is_slow = False
        for key in sections:
            assert fetch(cache, key) == list_expected(sections[key])
        assert cache.describe().in_flight_bytes == 0
        opened.clear()
        is_slow = True
        pressing = threading.Thread(target=interrupt)
        pressing.start()
        with pytest.raises(KeyboardInterrupt):
            fetch(cache, 0)
        pressing.join(WAIT_S)
        opened.set()


def test_two_readers_of_one_file_do_not_meet(path: Path, tmp_path: Path) -> None:
    sections = list_sections(identify(path), is_coalesced=False, has_checksums=False)
    faults = Faults(0.0)
    wrong: list[str] = []

    def run(reader: SectionReader, seed: int) -> None:
        draw, cache = random.Random(seed), make_cache(sections, reader)
        for number in range(120):
            key = draw.randrange(NUM_SECTIONS)
            try:
                if fetch(cache, key) != list_expected(sections[key]):
                    wrong.append(f"section {key} at {number}")
            except SectionReadError as error:
                if reader is good:
                    wrong.append(str(error))

    records = [ChecksumRecord(tmp_path / "kept") for _ in range(2)]
    with (
        SectionReader(2, checksums=records[0]) as good,
        SectionReader(2, checksums=records[1], read_at=faults.read_at) as bad,
    ):
        for key in sections:
            fetch(make_cache(sections, bad), key)
        faults.probability = 0.1
        threads = [threading.Thread(target=run, args=pair) for pair in [(good, 1), (bad, 2)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert faults.count > 20
    later = ChecksumRecord(tmp_path / "kept")
    for section in sections.values():
        for extent, expected in zip(section.extents, list_expected(section), strict=True):
            assert later.find(extent) == zlib.crc32(expected)
