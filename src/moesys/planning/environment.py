"""What moesys finds on this machine that decides how fast it runs, and what of it a person should know or change.

Facts are read once into a record; what to say about them is a pure function of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from moesys.kernels import native
from moesys.planning.machine import Disk, Machine, count_cores, read_disk, read_machine, read_ram_bytes
from moesys.planning.machine_profile import MachineProfile
from moesys.units import format_bytes

_NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "ceph",
        "lustre",
        "glusterfs",
        "beegfs",
        "afs",
        "fuse.sshfs",
    }
)
_SLOW_DISK_BYTES_PER_S = 0.3e9
_MUCH_SWAP_BYTES = 256 * 2**20
_SELF_GOVERNING_DRIVERS = ("intel_pstate", "amd-pstate")
"""Under them ``powersave`` is a policy that follows the load, not the lowest clock."""


@dataclass(frozen=True)
class Environment:
    """This machine, as this process finds it.

    ram_bytes:        that this process may use; ``machine_bytes`` is what there is.
    num_all_cores:    of the machine; ``machine.num_cores`` of them are this process's.
    cpu_quota:        cores' worth of time that the container may use; None where there is no limit.
    load:             processes that wanted to run during the last minute; None where the system does not say.
    native_obstacle:  why there are no native kernels; None where there are.
    governor:         of the clock, with its driver; None where the system does not say.
    huge_pages:       ``always``, ``madvise`` or ``never``; None where the system does not say.
    gpu:              its name; None without one that torch can use.
    """

    machine: Machine
    disk: Disk
    ram_bytes: int
    machine_bytes: int
    num_all_cores: int
    cpu_quota: float | None
    load: float | None
    swap_bytes: int
    native_obstacle: str | None
    torch_version: str
    gpu: str | None
    governor: str | None
    governor_driver: str | None
    huge_pages: str | None


@dataclass(frozen=True)
class Advice:
    """Something that makes models slower than they need be, or than was measured."""

    what: str
    fix: str


def read_environment(path: Path, root: Path = Path("/")) -> Environment:
    """Returns the facts; ``path`` lies on the disk in question, ``root`` is where ``sys`` is found."""
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    return Environment(
        machine=read_machine(),
        disk=read_disk(path),
        ram_bytes=read_ram_bytes(root / "sys/fs/cgroup"),
        machine_bytes=psutil.virtual_memory().total,
        num_all_cores=os.cpu_count() or count_cores(),
        cpu_quota=_read_cpu_quota(root / "sys/fs/cgroup/cpu.max"),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        swap_bytes=psutil.swap_memory().used,
        native_obstacle=native.find_obstacle(),
        torch_version=torch.__version__,
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        governor=_read_line(frequency / "scaling_governor"),
        governor_driver=_read_line(frequency / "scaling_driver"),
        huge_pages=_read_choice(root / "sys/kernel/mm/transparent_hugepage/enabled"),
    )


def list_advice(found: Environment, profile: MachineProfile | None = None) -> Iterator[Advice]:
    """Yields what should be known, with a fix each; more of it once the machine was measured."""
    machine = found.machine
    if found.native_obstacle is not None:
        yield Advice(
            f"no native kernels, torch computes several times slower: {found.native_obstacle}",
            "install a C compiler (apt-get install gcc, or dnf install gcc) and run again",
        )
    if machine.num_threads < machine.num_cores:
        yield Advice(
            f"{machine.num_threads} of {machine.num_cores} cores compute",
            "unset OMP_NUM_THREADS, or set it to the number of cores",
        )
    if machine.num_cores < found.num_all_cores:
        yield Advice(
            f"this process may use {machine.num_cores} of {found.num_all_cores} cores",
            "start it without taskset or a cpuset to use all of them",
        )
    if found.cpu_quota is not None and found.cpu_quota < machine.num_cores:
        yield Advice(
            f"the container gets {found.cpu_quota:g} cores' time for {machine.num_cores} cores",
            "raise its CPU limit (docker run --cpus), or set OMP_NUM_THREADS to it",
        )
    if found.load is not None and found.load > 0.5 * machine.num_cores:
        yield Advice(
            f"other work is running (load {found.load:.1f} on {machine.num_cores} cores): what was measured is too low",
            "run moesys doctor again when the machine is idle",
        )
    if found.ram_bytes < found.machine_bytes:
        yield Advice(
            f"the container may use {format_bytes(found.ram_bytes)} of {format_bytes(found.machine_bytes)} RAM",
            "raise its memory limit (docker run --memory); budgets above it end the process",
        )
    if found.swap_bytes > _MUCH_SWAP_BYTES:
        yield Advice(
            f"{format_bytes(found.swap_bytes)} lie in swap: memory is short, and weights that are swapped out are slow",
            "end what is not needed, or run models within a smaller --host-memory",
        )
    if found.governor == "powersave" and not _follows_load(found.governor_driver):
        yield Advice(
            "the CPU runs at its lowest clock (governor powersave)",
            "cpupower frequency-set -g performance",
        )
    if found.huge_pages == "never":
        yield Advice(
            "huge pages are off: weights load slower and every look-up of an address costs more",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    if found.disk.file_system in _NETWORK_FILE_SYSTEMS:
        yield Advice(
            f"the folder lies on a network file system ({found.disk.file_system})",
            "copy the model to a disk of this machine",
        )
    if profile is not None:
        yield from _judge_disk(profile)


def _judge_disk(profile: MachineProfile) -> Iterator[Advice]:
    best = profile.best_sequential_read.bytes_per_s
    if best < _SLOW_DISK_BYTES_PER_S:
        yield Advice(
            f"the disk is slow ({best / 1e9:.2f} GB/s): experts that are not in memory will dominate",
            "put the model on an SSD, give more memory, or use packed int8 weights",
        )
    if profile.direct_obstacle is not None:
        yield Advice(
            f"reads go through the page cache only: {profile.direct_obstacle}",
            "none is needed; a local ext4 or xfs file system allows both",
        )


def _follows_load(driver: str | None) -> bool:
    return driver is not None and driver.startswith(_SELF_GOVERNING_DRIVERS)


def _read_line(path: Path) -> str | None:
    return path.read_text().strip() if path.is_file() else None


def _read_choice(path: Path) -> str | None:
    """Returns the word in brackets, as the kernel marks the choice in force."""
    line = _read_line(path)
    return line.partition("[")[2].partition("]")[0] or None if line is not None else None


def _read_cpu_quota(path: Path) -> float | None:
    words = (_read_line(path) or "").split()
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None
    return int(words[0]) / int(words[1])
