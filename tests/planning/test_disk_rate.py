"""Rates of a disk that the test is: exact with a clock of its own, in the order and the sizes that were asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from moesys.planning.disk_rate import DiskReader, ReadPattern
from moesys.planning.probe_file import ProbeFile
from moesys.store import ReadMode

KIB = 1024


class FakeDisk:
    """Delivers every request in one second of its own clock and remembers it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.requests: list[tuple[int, int]] = []
        self.num_inside = self.most_inside = 0
        self._lock = threading.Lock()

    def read_at(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            self.num_inside += 1
            self.most_inside = max(self.most_inside, self.num_inside)
        with self._lock:
            self.now += 1.0
            self.requests.append((offset, len(buffers[0])))
            self.num_inside -= 1
        return len(buffers[0])

    def clock(self) -> float:
        return self.now


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[ProbeFile]:
    path = tmp_path / "file"
    path.write_bytes(b"")
    descriptor = os.open(path, os.O_RDONLY)
    yield ProbeFile("file", 64 * KIB, {ReadMode.BUFFERED: descriptor, ReadMode.DIRECT: descriptor})
    os.close(descriptor)


def measure(probe: ProbeFile, pattern: ReadPattern, seconds: float) -> tuple[float, FakeDisk]:
    disk = FakeDisk()
    rate = DiskReader(probe, pattern, read_at=disk.read_at, clock=disk.clock).measure(seconds)
    assert rate.pattern is pattern
    return rate.bytes_per_s, disk


@pytest.mark.parametrize("mode", list(ReadMode))
@pytest.mark.parametrize("depth", [1, 3])
def test_the_rate_is_all_bytes_over_all_seconds(probe: ProbeFile, mode: ReadMode, depth: int) -> None:
    pattern = ReadPattern(mode, 8 * KIB, depth, piece_bytes=8 * KIB)
    rate, disk = measure(probe, pattern, seconds=20.0)
    assert rate == 8 * KIB
    assert 20 <= len(disk.requests) <= 20 + depth
    assert disk.most_inside <= depth


def test_at_least_one_piece_is_read_however_short_the_time(probe: ProbeFile) -> None:
    rate, disk = measure(probe, ReadPattern(ReadMode.BUFFERED, 4 * KIB, 1), seconds=0.0)
    assert (rate, len(disk.requests)) == (4 * KIB, 1)


def test_in_order_each_section_begins_where_the_last_one_ended(probe: ProbeFile) -> None:
    pattern = ReadPattern(ReadMode.BUFFERED, 16 * KIB, 1, is_sequential=True, piece_bytes=8 * KIB)
    _, disk = measure(probe, pattern, seconds=10.0)
    assert disk.requests == [(i % 8 * 8 * KIB, 8 * KIB) for i in range(10)]


def test_elsewhere_each_section_comes_once_before_any_comes_again_and_its_pieces_together(
    probe: ProbeFile,
) -> None:
    pattern = ReadPattern(ReadMode.DIRECT, 12 * KIB, 1, piece_bytes=8 * KIB)
    _, disk = measure(probe, pattern, seconds=20.0)
    sections = [offset for offset, _ in disk.requests[::2]]
    assert sorted(sections[:5]) == [i * 12 * KIB for i in range(5)] != sections[:5]
    assert sections[5:] == sections[:5]
    assert all(
        second == (offset + 8 * KIB, 4 * KIB)
        for (offset, _), second in zip(disk.requests[::2], disk.requests[1::2], strict=True)
    )


def test_a_file_smaller_than_a_section_is_read_from_its_beginning(probe: ProbeFile) -> None:
    _, disk = measure(probe, ReadPattern(ReadMode.BUFFERED, 256 * KIB, 1), seconds=3.0)
    assert disk.requests == [(0, 256 * KIB)] * 3


def test_an_error_of_the_disk_is_the_callers_and_stops_the_other_threads(probe: ProbeFile) -> None:
    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        DiskReader(probe, ReadPattern(ReadMode.BUFFERED, 4 * KIB, 4), read_at=fail).measure(60.0)


def test_one_thread_that_fails_stops_the_others(probe: ProbeFile) -> None:
    """Whichever it is: the other one would go on for ages."""
    disk = FakeDisk()

    def read_at(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == 36 * KIB:
            raise OSError(5, "Input/output error")
        return disk.read_at(descriptor, buffers, offset)

    pattern = ReadPattern(ReadMode.DIRECT, 4 * KIB, 2, is_sequential=True)
    reader = DiskReader(probe, pattern, read_at=read_at, clock=disk.clock)
    with pytest.raises(OSError, match="Input/output error"):
        reader.measure(1e12)


def test_a_reader_that_is_stopped_ends(probe: ProbeFile) -> None:
    disk = FakeDisk()
    reader = DiskReader(
        probe, ReadPattern(ReadMode.BUFFERED, 4 * KIB, 1), read_at=disk.read_at, clock=disk.clock
    )
    reader.stop()
    reader.measure(1e9)
    assert len(disk.requests) == 1


def test_what_was_read_through_the_page_cache_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(32 * KIB))
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, count, advice: dropped.append((start, count)))
    descriptor = os.open(path, os.O_RDONLY)
    modes = {ReadMode.BUFFERED: descriptor, ReadMode.DIRECT: descriptor}
    for mode in (ReadMode.DIRECT, ReadMode.BUFFERED):
        pattern = ReadPattern(mode, 16 * KIB, 1, is_sequential=True)
        DiskReader(ProbeFile("f", 32 * KIB, modes), pattern).measure(0.0)
    os.close(descriptor)
    assert dropped == [(0, 16 * KIB)]
