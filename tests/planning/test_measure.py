"""Measuring: overlaps with a clock of our own, modes that fail, and once for real, small."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moesys.planning import ceilings, layer_overhead, measure
from moesys.planning.ceilings import WeightFormat
from moesys.planning.disk_rate import DiskRate, DiskReader, ReadPattern
from moesys.planning.layer_overhead import measure_layer_overhead
from moesys.planning.machine import read_disk, read_machine
from moesys.planning.measure import (
    DiskTrial,
    make_gemm_work,
    make_memory_work,
    measure_machine,
    measure_overlap,
)
from moesys.planning.probe_file import ProbeFile
from moesys.store import ReadMode

KIB = 1024
SMALL = DiskTrial(
    seconds=0.0,
    section_bytes=(4 * KIB, 16 * KIB),
    sequential_bytes=8 * KIB,
    depths=(1, 2),
    file_bytes=256 * KIB,
)


@pytest.fixture
def _small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured, each on next to nothing."""
    monkeypatch.setattr(ceilings, "_SIZE", 64)
    monkeypatch.setattr(ceilings, "_MIN_SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "_READ_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "_WEIGHT_BYTES", 2**17)
    monkeypatch.setattr(layer_overhead, "_NUM_STEPS", 3)
    monkeypatch.setattr(measure, "make_memory_work", lambda: make_memory_work(2**16))
    monkeypatch.setattr(measure, "make_gemm_work", lambda: make_gemm_work(32))


@pytest.mark.usefixtures("_small_work")
def test_a_whole_machine(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    state = torch.get_rng_state()
    profile = measure_machine(tmp_path, lambda *step: told.append(step), SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []
    assert (profile.machine, profile.disk) == (read_machine(), read_disk(tmp_path))
    assert set(profile.weight_read_bytes_per_s) == set(profile.linear_flops_per_s) == set(WeightFormat)
    rates = [
        profile.memory_read_bytes_per_s,
        profile.layer_overhead_s,
        *profile.gemm_flops_per_s.values(),
        *profile.weight_read_bytes_per_s.values(),
        *profile.linear_flops_per_s.values(),
        *(rate.bytes_per_s for rate in profile.disk_rates),
        profile.memory_overlap.disk_bytes_per_s,
        profile.memory_overlap.work_per_s,
        profile.gemm_overlap.disk_bytes_per_s,
        profile.gemm_overlap.work_per_s,
    ]
    assert min(rates) > 0
    modes = 1 if profile.direct_obstacle else 2
    assert len({rate.pattern for rate in profile.disk_rates}) == modes * 3 * 2
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert told[-1] == (len(told) - 1, len(told) - 1, "done")


def measure_disk_of(probe: ProbeFile, monkeypatch: pytest.MonkeyPatch, fail: type[OSError] | None) -> object:
    def read(self: DiskReader, seconds: float) -> DiskRate:
        pattern: ReadPattern = self._pattern
        if fail is not None and pattern.mode is ReadMode.DIRECT and pattern.depth == 2:
            raise fail(errno.EINVAL, "Invalid argument")
        return DiskRate(pattern, 1.0)

    monkeypatch.setattr(DiskReader, "measure", read)
    patterns = SMALL.list_patterns(probe.descriptors)
    steps = measure._Steps(lambda done, total, what: None, len(patterns))
    return measure._measure_disk(probe, patterns, 0.0, steps)


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[ProbeFile]:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * KIB))
    descriptor = os.open(path, os.O_RDONLY)
    yield ProbeFile("file", 64 * KIB, {ReadMode.BUFFERED: descriptor, ReadMode.DIRECT: descriptor})
    os.close(descriptor)


def test_direct_reads_that_fail_are_left_out_with_the_reason(
    probe: ProbeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, obstacle = measure_disk_of(probe, monkeypatch, OSError)
    assert {rate.pattern.mode for rate in rates} == {ReadMode.BUFFERED}
    assert len(rates) == 6
    assert obstacle == "direct reads fail: Invalid argument"
    rates, obstacle = measure_disk_of(probe, monkeypatch, None)
    assert (len(rates), obstacle) == (12, None)


def test_modes_take_turns() -> None:
    patterns = SMALL.list_patterns(list(ReadMode))
    assert [pattern.mode for pattern in patterns] == [ReadMode.BUFFERED, ReadMode.DIRECT] * 6
    assert len(set(patterns)) == len(patterns)


class FakeReads:
    """Reads that end when they are told to."""

    def __init__(self, pattern: ReadPattern) -> None:
        self._rate = DiskRate(pattern, 7.0)
        self.may_end = threading.Event()

    def measure(self, seconds: float) -> DiskRate:
        assert self.may_end.wait(timeout=10.0)
        return self._rate

    def stop(self) -> None:
        self.may_end.set()


def test_an_overlap_counts_what_was_done_until_the_reads_ended() -> None:
    """Three times 5 units of work, and a second for each."""
    now = 0.0
    reads = FakeReads(ReadPattern(ReadMode.DIRECT, 4 * KIB, 1))

    def work() -> float:
        nonlocal now
        now += 1.0
        if now == 3.0:
            reads.stop()
        return 5.0

    overlap = measure_overlap(reads, work, 3.0, clock=lambda: now)  # pyrefly: ignore
    assert now >= 3.0
    assert (overlap.disk_bytes_per_s, overlap.work_per_s) == (7.0, 5.0)


def test_work_that_fails_stops_the_reads(probe: ProbeFile) -> None:
    def fail() -> float:
        raise KeyboardInterrupt

    reader = DiskReader(probe, ReadPattern(ReadMode.BUFFERED, 4 * KIB, 2))
    with pytest.raises(KeyboardInterrupt):
        measure_overlap(reader, fail, seconds=60.0)


def test_work_says_how_much_it_did() -> None:
    assert make_memory_work(4096)() == 4096.0
    assert make_gemm_work(16)() == 2 * 16**3


def test_a_layer_without_work_takes_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 8.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(layer_overhead, "_NUM_STEPS", 3)
    monkeypatch.setattr(layer_overhead.time, "perf_counter", lambda: next(ticks))
    assert measure_layer_overhead() == 2.0 / layer_overhead._NUM_LAYERS


@pytest.mark.parametrize("weight_format", list(WeightFormat))
def test_a_kernels_rate_is_weights_over_seconds(
    weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "_SIZE", 64)
    monkeypatch.setattr(ceilings, "_WEIGHT_BYTES", 2**15)
    monkeypatch.setattr(ceilings, "_time_best", lambda work: (work(), 0.5)[1])
    calls: list[tuple[torch.Size, int]] = []

    def record(x: torch.Tensor, weight: object) -> None:
        calls.append((x.shape, ceilings._count_bytes(weight)))  # pyrefly: ignore

    monkeypatch.setattr(ceilings, "linear", record)
    num_bytes = {WeightFormat.FP32: 16384, WeightFormat.BF16: 8192, WeightFormat.INT8: 4352}[weight_format]
    assert ceilings.measure_weight_read_rate(weight_format) == ceilings._NUM_WEIGHTS * num_bytes / 0.5
    assert calls == [((1, 64), num_bytes)] * ceilings._NUM_WEIGHTS
    assert ceilings.measure_linear_rate(weight_format) == 2 * 128 * 64 * 64 / 0.5
    assert calls[-1] == ((128, 64), num_bytes)
