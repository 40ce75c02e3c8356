"""The memory of this machine, as far as this process may use it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

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
