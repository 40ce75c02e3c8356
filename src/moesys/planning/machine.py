"""This machine: its memory, as far as this process may use it, its CPU and its disks."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from moesys.kernels import native
from moesys.kernels.native.cpu_level import find_cpu_level

_CGROUP_FILES = ("memory.max", "memory/memory.limit_in_bytes")


def read_ram_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes of RAM: the machine's, or the limit of the container where that is less."""
    limits = [psutil.virtual_memory().total]
    for name in _CGROUP_FILES:
        path = cgroups / name
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdecimal():
            limits.append(int(text))
    return min(limits)


def read_device_bytes() -> int | None:
    """Returns the bytes of the first GPU's memory; None without a GPU that torch can use."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def read_free_ram_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes of RAM that this process could still take without swapping: what the machine has available,
    or what the limit of the container leaves where that is less."""
    used = psutil.Process().memory_info().rss
    return min(psutil.virtual_memory().available, read_ram_bytes(cgroups) - used)


@dataclass(frozen=True)
class Machine:
    """What measured rates of computing hold for.

    num_cores:    that this process may use.
    num_threads:  that torch and the native kernels compute with.
    kernels:      ``native`` with the level of the CPU, or ``torch`` where there are none.
    """

    cpu: str
    num_cores: int
    num_threads: int
    kernels: str


@dataclass(frozen=True)
class Disk:
    """What measured rates of reading hold for: a device with a file system, as the system names them."""

    device: str
    file_system: str


def read_machine() -> Machine:
    """Returns this machine as this process sees it."""
    obstacle = native.find_obstacle()
    return Machine(
        cpu=_read_cpu_name(),
        num_cores=count_cores(),
        num_threads=torch.get_num_threads(),
        kernels="torch" if obstacle is not None else f"native {find_cpu_level().name}",
    )


def count_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_disk(path: Path) -> Disk:
    """Returns the disk that an existing path lies on; ``unknown`` where the system does not list it."""
    place = path.resolve()
    mounts = [
        mount
        for mount in psutil.disk_partitions(all=True)
        if place.is_relative_to(mount.mountpoint) and mount.fstype
    ]
    if not mounts:
        return Disk("unknown", "unknown")
    # Of several mounts at one point, the last one is seen.
    nearest = max(enumerate(mounts), key=lambda item: (len(item[1].mountpoint), item[0]))[1]
    return Disk(nearest.device, nearest.fstype)


def _read_cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
