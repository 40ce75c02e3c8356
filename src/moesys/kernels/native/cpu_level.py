"""What this CPU can execute, as one of a few levels that the native kernels are built for.

A level and not the exact model: the bits of a result depend on the level's vector width and on nothing else.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from moesys import env
from moesys.errors import KernelError


@dataclass(frozen=True)
class CpuLevel:
    """A set of instructions.

    features:  the names of /proc/cpuinfo that it needs.
    flags:     what tells the compiler to use them.
    """

    name: str
    features: frozenset[str] = frozenset()
    flags: tuple[str, ...] = ()


_AVX2 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mf16c")
_AVX512_FLAGS = (
    *_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
)  # fmt: skip

LEVELS = (
    CpuLevel(
        "avx512bf16",
        _AVX512 | {"avx512_vnni", "avx512_bf16"},
        (*_AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16"),
    ),
    CpuLevel("avx512vnni", _AVX512 | {"avx512_vnni"}, (*_AVX512_FLAGS, "-mavx512vnni")),
    CpuLevel("avx512", _AVX512, _AVX512_FLAGS),
    CpuLevel("avx2", _AVX2, _AVX2_FLAGS),
    CpuLevel("baseline"),
)
"""Best first. The last one runs everywhere."""


def find_cpu_level() -> CpuLevel:
    """Returns the best level of this CPU, or the one that ``MOESYS_CPU_LEVEL`` names.

    Raises `KernelError` for a level that does not exist or that this CPU lacks.
    """
    available = _read_features()
    usable = [level for level in LEVELS if level.features <= available]
    wanted = env.read_cpu_level()
    if wanted is None:
        return usable[0]
    for level in usable:
        if level.name == wanted:
            return level
    raise KernelError(
        f"MOESYS_CPU_LEVEL is '{wanted}'; this CPU has {', '.join(level.name for level in usable)}"
    )


def is_half_used_by_mkl() -> bool:
    """Whether the level in use has AVX-512 and the CPU is AMD's: MKL gives it AVX2 code, at half the rate."""
    return find_cpu_level().features >= _AVX512 and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()


def _read_features() -> frozenset[str]:
    """The CPU's features as Linux on x86 names them; none elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
