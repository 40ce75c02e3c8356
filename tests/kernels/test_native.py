"""The native kernels as a library: how they are built, what they run on, and what happens where they cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesys.errors import KernelError
from moesys.kernels import native
from moesys.kernels.native.build import build_library
from moesys.kernels.native.cpu_level import LEVELS, find_cpu_level

USABLE = [level for level in LEVELS if level.features <= find_cpu_level().features]
CHECK = """
import torch
from moesys.kernels import Int8Product, Kernel, linear, pack_int8
from moesys.kernels import BankView, ExpertForm, Rows, compute_experts, Activation

torch.manual_seed(0)
for rows, columns, outputs in ((1, 64, 64), (7, 130, 33), (13, 300, 70)):
    x, w, b = torch.randn(rows, columns), torch.randn(outputs, columns), torch.randn(outputs)
    for weight in (w, w.bfloat16(), *(pack_int8(w, product) for product in Int8Product)):
        wide = weight.double() if isinstance(weight, torch.Tensor) else weight
        oracle = linear(x.double(), wide, b.double(), Kernel.REFERENCE)
        error = (linear(x, weight, b, Kernel.NATIVE) - oracle).abs().max() / oracle.abs().max()
        assert error < 1e-5, (type(weight), rows, columns, float(error))
rows = Rows(torch.randn(5, 40), torch.tensor([0, 4, 2, 1, 0, 3]), torch.tensor([0, 2, 2, 6]))
for activation in Activation:
    form = ExpertForm(activation)
    view = BankView(torch.randn(3, form.num_halves * 50, 40), torch.randn(3, 40, 50), form=form)
    oracle = compute_experts(rows, view, kernel=Kernel.REFERENCE)
    error = (compute_experts(rows, view, kernel=Kernel.NATIVE) - oracle).abs().max() / oracle.abs().max()
    assert error < 1e-5, (activation, float(error))
    a, b = (compute_experts(rows, view, kernel=Kernel.NATIVE) for _ in range(2))
    assert torch.equal(a, b)
print("agreed")
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("level", USABLE, ids=lambda level: level.name)
def test_every_level_of_this_cpu_equals_the_reference(level: object) -> None:
    ended = run_python(CHECK, MOESYS_CPU_LEVEL=level.name)  # pyrefly: ignore
    assert ended.stdout == "agreed\n", ended.stderr


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64")
@pytest.mark.parametrize(("level", "cpu"), [("avx2", "Haswell"), ("baseline", "Nehalem")])
def test_older_levels_have_no_instruction_of_newer_cpus(level: str, cpu: str) -> None:
    """A new CPU runs anything, so an older one is emulated."""
    library = build_library(next(each for each in LEVELS if each.name == level))
    driver = (
        "import ctypes, array; data = array.array('f', [1.0]) * (1 << 17);"
        f"lib = ctypes.CDLL({str(library)!r}); lib.moesys_read.restype = ctypes.c_float;"
        "address = data.buffer_info()[0];"
        "print(lib.moesys_read(ctypes.c_void_p(address), ctypes.c_int64(len(data)), 1))"
    )
    ended = subprocess.run(
        ["qemu-x86_64", "-cpu", cpu, sys.executable, "-S", "-c", driver],
        capture_output=True,
        text=True,
        check=False,
    )
    assert float(ended.stdout) == 1 << 17, ended.stderr


def test_there_is_one_openmp_runtime() -> None:
    assert native.find_obstacle() is None
    maps = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in maps}
    runtimes = {path for path in paths if any(name in path for name in ("libgomp", "libiomp", "libomp"))}
    assert len(runtimes) == 1, runtimes


def test_a_build_is_reused_and_named_by_what_went_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESYS_CACHE", str(tmp_path))
    first = build_library(LEVELS[-1])
    written = first.stat().st_mtime_ns
    assert build_library(LEVELS[-1]) == first
    assert first.stat().st_mtime_ns == written
    monkeypatch.setenv("CC", "cc -DOTHER")
    assert build_library(LEVELS[-1]) != first
    assert [path.suffix for path in first.parent.iterdir()] == [".so", ".so"]


def test_without_a_compiler_torch_computes_and_it_is_said_once(tmp_path: Path) -> None:
    code = (
        "import torch; from moesys.kernels import linear\n"
        "w = torch.randn(3, 4)\n"
        "for _ in range(2): print(tuple(linear(torch.randn(2, 4), w).shape))"
    )
    ended = run_python(code, MOESYS_CACHE=str(tmp_path), PATH=str(tmp_path))
    assert ended.stdout == "(2, 3)\n(2, 3)\n"
    assert (
        ended.stderr.count("native CPU kernels are off, torch computes instead: no C compiler was found") == 1
    )


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "CC is 'no-such-compiler', which is not an executable"),
        ("false", "false failed on"),
    ],
)
def test_a_broken_compiler_is_named(
    compiler: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESYS_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(KernelError, match=message):
        build_library(LEVELS[-1])


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOESYS_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        KernelError, match=r"could not be written to .*; set MOESYS_CACHE to a writable folder"
    ):
        build_library(LEVELS[-1])


def test_an_unknown_level_lists_what_this_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESYS_CPU_LEVEL", "mmx")
    with pytest.raises(KernelError, match=r"MOESYS_CPU_LEVEL is 'mmx'; this CPU has .*baseline"):
        find_cpu_level()


def test_reading_memory_reads_all_of_it() -> None:
    assert native.read_memory(torch.ones(1 << 18)) == 1 << 18
