"""What was measured of a machine and one of its disks, as a record and as a file that outlives the process.

The file holds one profile for each machine and disk, so that a home folder shared by several machines and models on
several disks work. A profile of other hardware, threads or kernels is not found: it would promise the wrong speed.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moesys import env
from moesys.errors import ConfigError
from moesys.planning.ceilings import WeightFormat
from moesys.planning.disk_rate import DiskRate
from moesys.planning.machine import Disk, Machine
from moesys.store import ReadMode

_FORMAT = "moesys-machine"
_VERSION = 1
_CLEARLY_FASTER = 1.03
"""Below this ratio more requests in flight only cost memory."""


@dataclass(frozen=True)
class Overlap:
    """A disk and the CPU at work at the same time.

    work_per_s:  bytes read from memory, or floating-point operations.
    """

    disk_bytes_per_s: float
    work_per_s: float


@dataclass(frozen=True)
class ReadWay:
    """How a reader reads: in which mode, with how many pieces in flight."""

    mode: ReadMode
    depth: int


@dataclass(frozen=True)
class MachineProfile:
    """Rates, per second.

    measured_on:               date and time, ISO 8601.
    memory_read_bytes_per_s:   the most that memory gives.
    gemm_flops_per_s:          the most that matrix products of a dtype reach.
    weight_read_bytes_per_s:   of weights in a format, while one row is multiplied with them.
    linear_flops_per_s:        of many rows times weights in a format.
    layer_overhead_s:          seconds of a layer that is too small to cost anything.
    direct_obstacle:           why nothing was read past the page cache; None where it was.
    overlap_section_bytes:     of the sections that were read, the fastest way, while something else went on:
    memory_overlap:            memory was read.
    gemm_overlap:              float32 matrix products were computed.
    """

    machine: Machine
    disk: Disk
    probe: str
    measured_on: str
    memory_read_bytes_per_s: float
    gemm_flops_per_s: Mapping[str, float]
    weight_read_bytes_per_s: Mapping[WeightFormat, float]
    linear_flops_per_s: Mapping[WeightFormat, float]
    layer_overhead_s: float
    disk_rates: tuple[DiskRate, ...]
    direct_obstacle: str | None
    overlap_section_bytes: int
    memory_overlap: Overlap
    gemm_overlap: Overlap

    @property
    def reads(self) -> tuple[ReadWay, ...]:
        """The ways to read that were measured, those with the fewest pieces in flight first."""
        ways = {ReadWay(rate.pattern.mode, rate.pattern.depth) for rate in self.disk_rates}
        return tuple(sorted(ways, key=lambda way: (way.depth, way.mode)))

    def find_section_rate(self, way: ReadWay, section_bytes: int) -> float:
        """Returns how fast sections about as large are read, anywhere in a file, in bytes per second."""
        rates = [rate for rate in self.disk_rates if not rate.pattern.is_sequential and _is_of(rate, way)]
        return choose_best(rates, section_bytes).bytes_per_s

    def find_sequential_rate(self, way: ReadWay) -> float:
        """Returns how fast a file is read from one end to the other, in bytes per second."""
        return max(
            rate.bytes_per_s for rate in self.disk_rates if rate.pattern.is_sequential and _is_of(rate, way)
        )

    def find_best_read(self, section_bytes: int) -> DiskRate:
        """Returns the fastest way to read sections about as large, anywhere in a file; of ways that are as fast, the
        one with the fewest pieces in flight."""
        return choose_best(
            [rate for rate in self.disk_rates if not rate.pattern.is_sequential], section_bytes
        )

    @property
    def best_sequential_read(self) -> DiskRate:
        """The fastest way to read a file from one end to the other."""
        return choose_best([rate for rate in self.disk_rates if rate.pattern.is_sequential], 1)


def choose_best(rates: Sequence[DiskRate], section_bytes: int) -> DiskRate:
    """Returns the best of rates, at least one, whose sections are the nearest in size to ``section_bytes``."""
    sizes = {rate.pattern.section_bytes for rate in rates}
    nearest = min(sizes, key=lambda size: abs(math.log(size / section_bytes)))
    near = [rate for rate in rates if rate.pattern.section_bytes == nearest]
    best = max(rate.bytes_per_s for rate in near)
    good = [rate for rate in near if rate.bytes_per_s * _CLEARLY_FASTER >= best]
    return min(good, key=lambda rate: (rate.pattern.depth, -rate.bytes_per_s))


def _is_of(rate: DiskRate, way: ReadWay) -> bool:
    return (rate.pattern.mode, rate.pattern.depth) == (way.mode, way.depth)


def find_profile_path() -> Path:
    """Returns where profiles are kept when no other file is named."""
    return env.read_cache_dir() / "machine.json"


def read_profiles(path: Path) -> tuple[MachineProfile, ...]:
    """Returns the profiles of a file, none where there is no file. Raises `ConfigError` for one that is no such file
    or of another version."""
    if not path.exists():
        return ()
    fix = "run moesys doctor to measure anew"
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not a JSON file ({error}); {fix}") from None
    found = (tree.get("format"), tree.get("version")) if isinstance(tree, dict) else (None, None)
    if found != (_FORMAT, _VERSION):
        raise ConfigError(
            f"{path} has format and version {found}, this moesys reads {(_FORMAT, _VERSION)}; {fix}"
        )
    try:
        return TypeAdapter(tuple[MachineProfile, ...]).validate_python(tree.get("profiles"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {place}: {first['msg']}; {fix}") from None


def find_profile(profiles: Sequence[MachineProfile], machine: Machine, disk: Disk) -> MachineProfile | None:
    """Returns the profile of a machine and disk as they are now."""
    for profile in profiles:
        if profile.machine == machine and profile.disk == disk:
            return profile
    return None


def explain_absence(profiles: Sequence[MachineProfile], machine: Machine, disk: Disk) -> str:
    """Returns why `find_profile` found nothing, for people."""
    if not profiles:
        return "this machine was not measured yet"
    if all(profile.machine != machine for profile in profiles):
        then, now = asdict(profiles[-1].machine), asdict(machine)
        changes = [f"{name} {then[name]} is now {now[name]}" for name in now if then[name] != now[name]]
        return f"the machine is not as it was measured: {', '.join(changes)}"
    return f"the disk {disk.device} ({disk.file_system}) was not measured yet"


def save_profile(path: Path, profile: MachineProfile, others: Sequence[MachineProfile] = ()) -> None:
    """Writes a profile beside those of ``others`` that are not of the same machine and disk. The file is replaced as a
    whole. Raises `OSError`."""
    kept = [p for p in others if (p.machine, p.disk) != (profile.machine, profile.disk)]
    tree = {
        "format": _FORMAT,
        "version": _VERSION,
        "profiles": [asdict(each) for each in (*kept, profile)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        draft.write_text(json.dumps(tree, indent=1) + "\n")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
