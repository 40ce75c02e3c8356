"""Measures a machine and the disk of a folder or file: everything that plans are made from, in well under a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from moesys.kernels import multiply, native
from moesys.planning.ceilings import (
    WeightFormat,
    measure_gemm_rate,
    measure_linear_rate,
    measure_memory_read_rate,
    measure_weight_read_rate,
)
from moesys.planning.disk_rate import DiskRate, DiskReader, ReadPattern
from moesys.planning.layer_overhead import measure_layer_overhead
from moesys.planning.machine import read_disk, read_machine
from moesys.planning.machine_profile import MachineProfile, Overlap, choose_best
from moesys.planning.probe_file import DEFAULT_BYTES, ProbeFile, open_probe_file
from moesys.store import ReadMode

Progress = Callable[[int, int, str], None]
"""Gets how many measurements are done, how many there are, and what is measured next."""

_NUM_OTHERS = 6
"""Measurements besides those of the disk."""
_MIB = 2**20
_GEMM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DiskTrial:
    """How a disk is measured.

    seconds:           of each measurement.
    section_bytes:     sizes of sections at random places.
    sequential_bytes:  of sections in order.
    file_bytes:        of the file that is made where there is none.
    """

    seconds: float = 0.4
    section_bytes: tuple[int, ...] = (_MIB, 4 * _MIB, 12 * _MIB)
    sequential_bytes: int = 16 * _MIB
    depths: tuple[int, ...] = (1, 2, 4, 8)
    file_bytes: int = DEFAULT_BYTES

    def list_patterns(self, modes: Iterable[ReadMode]) -> list[ReadPattern]:
        """Returns every pattern that is tried; modes alternate, so that whoever else uses the disk slows down both."""
        sizes = [(self.sequential_bytes, True), *((size, False) for size in self.section_bytes)]
        return [
            ReadPattern(mode, size, depth, is_sequential)
            for size, is_sequential in sizes
            for depth in self.depths
            for mode in modes
        ]


def measure_machine(
    path: Path, on_progress: Progress = lambda done, total, what: None, trial: DiskTrial | None = None
) -> MachineProfile:
    """Measures this machine and the disk that ``path``, a folder or a file, lies on.

    Raises what `open_probe_file` raises, before anything is measured.
    """
    trial = trial or DiskTrial()
    with open_probe_file(path, trial.file_bytes) as probe:
        patterns = trial.list_patterns(probe.descriptors)
        steps = _Steps(on_progress, len(patterns) + _NUM_OTHERS)
        rates, obstacle = _measure_disk(probe, patterns, trial.seconds, steps)
        # What is read while something else runs are sections of the middle size, at random places.
        middle = sorted(trial.section_bytes)[len(trial.section_bytes) // 2]
        best = choose_best([rate for rate in rates if not rate.pattern.is_sequential], middle)
        steps.begin("memory and disk at once")
        memory_overlap = measure_overlap(
            DiskReader(probe, best.pattern), make_memory_work(), 2 * trial.seconds
        )
        steps.begin("matrix products and disk at once")
        gemm_overlap = measure_overlap(DiskReader(probe, best.pattern), make_gemm_work(), 2 * trial.seconds)
    steps.begin("memory")
    memory = measure_memory_read_rate()
    steps.begin("matrix products")
    cpu = torch.device("cpu")
    gemm = {name: measure_gemm_rate(dtype, cpu) for name, dtype in _GEMM_DTYPES.items()}
    steps.begin("kernels")
    weight_read = {form: measure_weight_read_rate(form) for form in WeightFormat}
    linear = {form: measure_linear_rate(form) for form in WeightFormat}
    steps.begin("layers")
    overhead = measure_layer_overhead()
    steps.finish()
    return MachineProfile(
        machine=read_machine(),
        disk=read_disk(path),
        probe=probe.name,
        measured_on=datetime.now(UTC).isoformat(timespec="seconds"),
        memory_read_bytes_per_s=memory,
        gemm_flops_per_s=gemm,
        weight_read_bytes_per_s=weight_read,
        linear_flops_per_s=linear,
        layer_overhead_s=overhead,
        disk_rates=tuple(rates),
        direct_obstacle=obstacle,
        overlap_section_bytes=middle,
        memory_overlap=memory_overlap,
        gemm_overlap=gemm_overlap,
    )


def measure_overlap(
    reader: DiskReader,
    work: Callable[[], float],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Overlap:
    """Reads for so long while ``work``, which returns how much it did, runs again and again in this thread."""
    with ThreadPoolExecutor(1, "moesys-probe") as pool:
        disk = pool.submit(reader.measure, seconds)
        try:
            start, amount = clock(), 0.0
            while not disk.done():
                amount += work()
            elapsed = clock() - start
        finally:
            reader.stop()
        return Overlap(disk.result().bytes_per_s, amount / max(elapsed, 1e-9))


def make_memory_work(num_bytes: int = 256 * _MIB) -> Callable[[], float]:
    """Returns work that reads so much memory and returns the bytes."""
    buffer = torch.ones(num_bytes // 4)
    read = native.read_memory if native.find_obstacle() is None else torch.max

    def work() -> float:
        read(buffer)
        return float(buffer.nbytes)

    return work


def make_gemm_work(size: int = 1024) -> Callable[[], float]:
    """Returns work that computes a float32 matrix product and returns its floating-point operations."""
    left, right, product = (torch.ones(size, size) for _ in range(3))

    def work() -> float:
        multiply(left, right.t(), product)
        return 2.0 * size**3

    return work


class _Steps:
    """Counts measurements for whoever watches."""

    def __init__(self, on_progress: Progress, total: int) -> None:
        self._on_progress = on_progress
        self._total = total
        self._done = 0

    def begin(self, what: str) -> None:
        self._on_progress(self._done, self._total, what)
        self._done += 1

    def finish(self) -> None:
        self._on_progress(self._total, self._total, "done")


def _measure_disk(
    probe: ProbeFile, patterns: Sequence[ReadPattern], seconds: float, steps: _Steps
) -> tuple[list[DiskRate], str | None]:
    """Returns the rates of every mode that works, and why direct reads do not where they do not."""
    probe.drop_pages()
    rates: list[DiskRate] = []
    obstacle = probe.direct_obstacle
    for pattern in patterns:
        steps.begin(f"disk, {pattern.mode}, {pattern.depth} in flight")
        if pattern.mode is ReadMode.DIRECT and obstacle is not None:
            continue
        try:
            rates.append(DiskReader(probe, pattern).measure(seconds))
        except OSError as error:
            if pattern.mode is ReadMode.BUFFERED:
                raise
            obstacle = f"direct reads fail: {error.strerror}"
            rates = [rate for rate in rates if rate.pattern.mode is not ReadMode.DIRECT]
    return rates, obstacle
