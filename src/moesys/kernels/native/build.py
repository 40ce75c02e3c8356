"""Builds the native kernels with the system's C compiler, once per source, compiler and CPU level.

A plain C library builds in a second or two, where one against torch's headers takes a minute. It lands in the
cache folder under a name made of everything that went into it, so a stale one is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
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
    try:
        folder = env.read_cache_dir() / "native"
        library = folder / f"moesys-{level.name}-{_fingerprint(compiler, flags)}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, flags, library)
        _require_own(library)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        raise KernelError(
            f"the native kernels could not be built: {error}; "
            "set MOESYS_CACHE to a writable folder and CC to a C compiler"
        ) from error
    return library


def _find_compiler() -> list[str]:
    named = env.read_compiler()
    if named is not None:
        try:
            words = shlex.split(named)
        except ValueError:
            words = []
        if words and shutil.which(words[0]):
            return words
        raise KernelError(f"CC is '{named}', which is not an executable; unset it or name a C compiler")
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise KernelError("no C compiler was found (cc, gcc or clang); install one for faster CPU kernels")


def _fingerprint(compiler: list[str], flags: list[str]) -> str:
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=False, timeout=_LIMIT_SECONDS
    ).stdout
    digest = hashlib.sha256("\0".join([platform.machine(), *compiler, *flags]).encode() + version)
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], flags: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        built = Path(work) / library.name
        sources = [str(source) for source in sorted(_SOURCES.glob("*.c"))]
        ended = subprocess.run(
            [*compiler, *flags, *sources, "-o", str(built), "-lm"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_SECONDS,
        )
        if ended.returncode:
            words = ended.stderr.strip().partition("\n")[0] or f"exit status {ended.returncode}"
            raise KernelError(f"the C compiler {compiler[0]} failed on the native kernels: {words}")
        os.replace(built, library)


def _require_own(library: Path) -> None:
    """Refuses to run code that another user wrote or could have written."""
    if os.name != "posix":
        return
    for path in (library.parent, library):
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise KernelError(
                f"{path} belongs to another user or can be written by others, so its native kernels are not loaded; "
                "set MOESYS_CACHE to a folder of your own"
            )
