"""The one place where environment variables are read. Each has a config key or flag that does the same."""

from __future__ import annotations

import os
from pathlib import Path


def read_cache_dir() -> Path:
    """Folder for tokenizers and packed corpora: ``MOESYS_CACHE``, else ``$XDG_CACHE_HOME/moesys``."""
    if explicit := os.environ.get("MOESYS_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "moesys"


def read_world_size() -> int:
    """How many processes torchrun has started: ``WORLD_SIZE``; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


def read_debug() -> bool:
    """Whether errors print a traceback: ``MOESYS_DEBUG=1``, the twin of ``--debug``."""
    return os.environ.get("MOESYS_DEBUG", "") not in ("", "0")


def read_kernel() -> str:
    """The implementation that operators use where none is asked for: ``MOESYS_KERNEL``; ``auto`` without it."""
    return os.environ.get("MOESYS_KERNEL", "") or "auto"


def read_compiler() -> str | None:
    """The C compiler that builds the native kernels: ``CC``; None to look for one."""
    return os.environ.get("CC") or None


def read_cpu_level() -> str | None:
    """The CPU level that native kernels are built for: ``MOESYS_CPU_LEVEL``; None for the best of this CPU."""
    return os.environ.get("MOESYS_CPU_LEVEL") or None
