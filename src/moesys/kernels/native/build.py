"""Builds the native kernels with the system's C compiler, once per source, compiler and CPU level.

A plain C library builds in a second or two, where one against torch's headers takes a minute. It lands in the
cache folder under a name made of everything that went into it, so a stale one is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from moesys import env
from moesys.errors import KernelError
from moesys.kernels.native.cpu_level import CpuLevel

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
_LIMIT_SECONDS = 120


def build_library(level: CpuLevel) -> Path:
    """Returns the path of the library for a CPU level, built now if it is not in the cache.

    Raises `KernelError` when there is no compiler, or with the compiler's words when it fails.
    """
    compiler = _find_compiler()
    flags = [*_FLAGS, *level.flags]
    folder = env.read_cache_dir() / "native"
    library = folder / f"moesys-{level.name}-{_fingerprint(compiler, flags)}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / library.name
            _compile([*compiler, *flags, *map(str, sorted(_SOURCES.glob("*.c"))), "-o", str(built), "-lm"])
            os.replace(built, library)
    except OSError as error:
        raise KernelError(
            f"the native kernels could not be written to {folder}: {error}; set MOESYS_CACHE to a writable folder"
        ) from error
    return library


def _find_compiler() -> list[str]:
    named = env.read_compiler()
    if named is not None:
        words = shlex.split(named)
        if words and shutil.which(words[0]):
            return words
        raise KernelError(f"CC is '{named}', which is not an executable; unset it or name a C compiler")
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise KernelError("no C compiler was found (cc, gcc or clang); install one for faster CPU kernels")


def _fingerprint(compiler: list[str], flags: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256("\0".join([*compiler, *flags]).encode() + version)
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_LIMIT_SECONDS)
    except subprocess.CalledProcessError as error:
        words = (error.stderr or "no message").strip().splitlines()
        raise KernelError(f"the C compiler {command[0]} failed on the native kernels: {words[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"the C compiler {command[0]} was not done after {_LIMIT_SECONDS} s") from error
