"""What every benchmark shares: fresh processes, fair order, peak memory, ceilings, claims, tables, files.

A benchmark is one script that starts itself again for each measurement, because two systems in one process
share allocators, thread pools and caches. This file knows nothing of models: it runs workers, turns their
numbers into medians of pairs and prints claims in one fixed form. Times are seconds, sizes bytes, rates
per second.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
"""What moesys asks of glibc when it trains (`moesys.training.allocator`), given to every system, since page faults
are up to a fifth of a step and have nothing to do with the code that is compared."""


@dataclass(frozen=True)
class Spread:
    """A median with the range from the 10th to the 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value; percentiles are interpolated."""
        if not values:
            raise ValueError("a spread needs at least one value; none was measured")
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), deciles[0], deciles[-1])


def pair_ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """``ours[i] / theirs[i]``: each pass compared with the same pass, so that slow drift cancels."""
    if len(ours) != len(theirs):
        raise ValueError(f"pairs need as many passes on both sides, got {len(ours)} and {len(theirs)}")
    return tuple(a / b for a, b in zip(ours, theirs, strict=True))


def alternating_passes(systems: Sequence[str], rounds: int) -> list[tuple[str, ...]]:
    """The order of measuring: per round once forwards and once backwards (A B B A)."""
    return [tuple(systems), tuple(reversed(systems))] * rounds


@dataclass(frozen=True)
class Claim:
    """One promise about a ratio: measured pairs against a floor that must and a goal that should be reached.

    ``missing`` names the system whose absence makes the claim void; such a claim is never ``ok``.
    """

    name: str
    floor: float
    pairs: tuple[float, ...] = ()
    goal: float | None = None
    better: Literal["higher", "lower"] = "higher"
    missing: str | None = None

    @property
    def spread(self) -> Spread:
        return Spread.of(self.pairs)

    @property
    def verdict(self) -> Literal["ok", "short", "skipped"]:
        """By the median alone."""
        if self.missing is not None:
            return "skipped"
        value = self.spread.median
        reached = value >= self.floor if self.better == "higher" else value <= self.floor
        return "ok" if reached else "short"

    @property
    def noisy(self) -> bool:
        """Whether the 10-90 % range lies on both sides of the floor."""
        return self.missing is None and self.spread.low < self.floor < self.spread.high

    @property
    def line(self) -> str:
        """``claim NAME value=… floor=… goal=… ok|short|skipped [noisy]``."""
        value = "-" if self.missing is not None else f"{self.spread.median:.3f}"
        goal = "-" if self.goal is None else f"{self.goal:.3f}"
        words = [
            "claim",
            self.name,
            f"value={value}",
            f"floor={self.floor:.3f}",
            f"goal={goal}",
            self.verdict,
        ]
        if self.missing is not None:
            words.append(self.missing)
        if self.noisy:
            words.append("noisy")
        return " ".join(words)

    @property
    def record(self) -> dict[str, Any]:
        spread = None if self.missing is not None else asdict(self.spread)
        return {**asdict(self), "spread": spread, "verdict": self.verdict, "noisy": self.noisy}


@dataclass(frozen=True)
class Outcome:
    """What a worker process came to: its record, why it could not run here, or how it broke."""

    record: dict[str, Any] | None = None
    skipped: str | None = None
    failed: str | None = None


def run_worker(script: Path, arguments: Sequence[str], threads: int, limit_seconds: float) -> Outcome:
    """Runs ``script`` with ``arguments`` in a fresh interpreter and reads the JSON object on its last line.

    A worker that prints ``{"skipped": REASON}`` cannot run here; any other end without a record is a failure.
    """
    environment = {
        **os.environ,
        **ALLOCATOR,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    command = [sys.executable, str(script), *arguments]
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(failed=f"not done after {limit_seconds:.0f} s")
    if ended.returncode:
        last_words = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        return Outcome(failed=f"exit code {ended.returncode}: {last_words}")
    record = json.loads(ended.stdout.strip().splitlines()[-1])
    return Outcome(skipped=record["skipped"]) if "skipped" in record else Outcome(record=record)


@dataclass
class Measured:
    """The records of each system, pass by pass, and who is absent and why."""

    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def is_out(self, system: str) -> bool:
        return system in self.skipped or system in self.failed

    def add(self, system: str, outcome: Outcome) -> None:
        """A system that is skipped or fails in one pass is out of all of them: pairs need every pass."""
        if outcome.record is not None:
            self.records.setdefault(system, []).append(outcome.record)
            return
        self.records.pop(system, None)
        if outcome.skipped is not None:
            self.skipped[system] = outcome.skipped
        else:
            self.failed[system] = outcome.failed or "no reason given"

    @property
    def absence_lines(self) -> list[str]:
        """``skipped NAME (REASON)`` and ``failed NAME (REASON)``."""
        skipped = [f"skipped {name} ({reason})" for name, reason in self.skipped.items()]
        return skipped + [f"failed {name} ({reason})" for name, reason in self.failed.items()]


@dataclass(frozen=True)
class Timing:
    """How long a call is repeated: at least ``min_calls`` times and ``min_seconds``, but none begins after
    ``max_seconds`` except the first."""

    min_calls: int = 5
    min_seconds: float = 0.3
    max_seconds: float = 2.0


def time_calls(call: Callable[[], object], timing: Timing) -> list[float]:
    """Seconds of each call. The caller has warmed up."""
    seconds: list[float] = []
    spent = 0.0
    while not seconds or (
        spent < timing.max_seconds and (len(seconds) < timing.min_calls or spent < timing.min_seconds)
    ):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
        spent += seconds[-1]
    return seconds


def _read_status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}; peak memory is measured on Linux only")


class PeakMemory:
    """The high-water mark of this process's resident memory above an idle process with the same imports.

    Make it after the imports and before anything is built: what is resident then counts as idle.
    """

    def __init__(self) -> None:
        self.idle_bytes = _read_status_bytes("VmRSS")
        self.was_reset = False

    def reset(self) -> None:
        """Starts the high-water mark anew. Where the kernel refuses, the mark since process start is kept."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.was_reset = False
        else:
            self.was_reset = True

    def read_bytes(self) -> int:
        if self.was_reset:
            return _read_status_bytes("VmHWM") - self.idle_bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.idle_bytes


def measure_gemm_flops(dtype_name: str, size: int = 2048, repeats: int = 8) -> float:
    """The best FLOP/s of ``repeats`` square matrix products in this process; dtype as torch names it."""
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name)
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    torch.mm(a, b, out=out)
    best_seconds = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best_seconds = min(best_seconds, time.perf_counter() - started)
    return 2 * size**3 / best_seconds


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first is left-aligned, the others right-aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [lines[0], rule, *lines[1:]]
    )


def describe_machine() -> dict[str, Any]:
    """CPU model, usable cores, memory, operating system, and how busy the last minute was (load average)."""
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in cpu_lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
    }


def describe_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """The installed version of Python and of each package; None where it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def describe_revision(folder: Path) -> str | None:
    """The git commit of ``folder``, ``+changes`` added when files differ from it; None outside a checkout."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "--no-optional-locks", "status", "--porcelain"])
    try:
        revision, changes = (
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{revision}+changes" if changes else revision


def write_record(
    path: Path,
    root: Path,
    machine: Mapping[str, Any],
    packages: Sequence[str],
    contents: Mapping[str, Any],
) -> None:
    """Writes a run as JSON: date, revision, the machine as it was before, versions, then ``contents``."""
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": describe_revision(root),
        "machine": dict(machine),
        "versions": describe_versions(packages),
        **contents,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def plot_bars(path: Path, unit: str, panels: Mapping[str, Mapping[str, Spread]]) -> None:
    """One panel of horizontal bars per title, a whisker for the 10-90 % range. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 2.6 * len(panels)), layout="constrained")
    for axes, (title, bars) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        spreads = list(bars.values())
        whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        axes.barh(list(bars), [s.median for s in spreads], xerr=whiskers, color="#4477aa")
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(unit)
    figure.savefig(path, dpi=150)
