"""The native kernels as a library: how they are built, what they run on, and what happens where they cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expert_cases import FORMATS, FORMS, MIXED, make_case, to_format

from moesys.errors import KernelError, ShapeError
from moesys.kernels import BankView, ExpertForm, Kernel, Rows, compute_experts, native
from moesys.kernels.native.build import build_library
from moesys.kernels.native.cpu_level import LEVELS, find_cpu_level
from moesys.kernels.native.library import find_openmp_runtimes

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
    half, weight = x.bfloat16(), w.bfloat16()
    oracle = half.double() @ weight.double().t()
    ours, torchs = (
        (linear(half, weight, kernel=kernel).double() - oracle).abs().max() for kernel in (Kernel.NATIVE, Kernel.TORCH)
    )
    assert ours <= 1.5 * torchs, (rows, columns, float(ours), float(torchs))
rows = Rows(torch.randn(5, 40), torch.tensor([0, 4, 2, 1, 0, 3]), torch.tensor([0, 2, 2, 6]))
formats = {
    "float32": lambda w: w,
    "bfloat16": lambda w: w.bfloat16(),
    "w8": lambda w: pack_int8(w, Int8Product.W8),
}
for activation in Activation:
    form = ExpertForm(activation)
    gate_up, down = torch.randn(3, form.num_halves * 50, 40), torch.randn(3, 40, 50)
    for name, to_format in formats.items():
        view = BankView(to_format(gate_up), to_format(down), form=form)
        oracle = compute_experts(rows, view, kernel=Kernel.REFERENCE)
        error = (compute_experts(rows, view, kernel=Kernel.NATIVE) - oracle).abs().max() / oracle.abs().max()
        assert error < 1e-5, (activation, name, float(error))
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


DRIVER = """
import array, ctypes
library = ctypes.CDLL({library!r})
pointers = []
def point(kind, values):
    pointers.append(array.array(kind, values))
    return pointers[-1].buffer_info()[0]
class Call(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("is_bf16", ctypes.c_int32), ("rows", ctypes.c_int64),
                ("columns", ctypes.c_int64), ("format", ctypes.c_int32), ("values", ctypes.c_void_p),
                ("scales", ctypes.c_void_p), ("w_rows", ctypes.c_int64), ("w_columns", ctypes.c_int64),
                ("bias", ctypes.c_void_p), ("y", ctypes.c_void_p), ("threads", ctypes.c_int32)]
rows, columns, outputs = 7, 64, 5
inputs = ((0, point("f", [2.0] * (rows * columns))), (1, point("H", [0x4000] * (rows * columns))))
for format, kind, one in ((0, "f", 1.0), (1, "H", 0x3F80), (2, "b", 1), (3, "b", 1)):
    w = (format, point(kind, [one] * (outputs * columns)), point("f", [1.0] * outputs), outputs, columns)
    for is_bf16, x in inputs:
        y = array.array("H" if is_bf16 else "f", [0] * (rows * outputs))
        call = Call(x, is_bf16, rows, columns, *w, None, y.buffer_info()[0], 1)
        assert library.moesys_linear(ctypes.byref(call)) == 0
        expected = 0x4300 if is_bf16 else 2 * columns
        assert all(abs(value - expected) < 1e-3 for value in y), (format, y)
print("agreed")
"""


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64")
@pytest.mark.parametrize(("level", "cpu"), [("avx2", "Haswell"), ("baseline", "Nehalem")])
def test_older_levels_have_no_instruction_of_newer_cpus(level: str, cpu: str) -> None:
    """A new CPU runs anything, so an older one is emulated."""
    library = build_library(next(each for each in LEVELS if each.name == level))
    ended = subprocess.run(
        ["qemu-x86_64", "-cpu", cpu, sys.executable, "-S", "-c", DRIVER.format(library=str(library))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "agreed\n", ended.stderr


def make_call(num_rows: int, form: ExpertForm, weight_format: str) -> tuple[Rows, BankView]:
    generator = torch.Generator().manual_seed(num_rows)
    gate_up = torch.randn(3, form.num_halves * 70, 40, generator=generator)
    down = torch.randn(3, 40, 70, generator=generator)
    view = BankView(to_format(gate_up, weight_format), to_format(down, weight_format), form=form)
    rows = Rows(
        torch.randn(num_rows, 40, generator=generator),
        torch.arange(num_rows),
        torch.tensor([0, 0, num_rows, num_rows]),
    )
    return rows, view


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("form", FORMS)
def test_a_rows_bits_do_not_depend_on_other_rows_or_threads(form: str, weight_format: str) -> None:
    rows, view = make_call(130, FORMS[form], weight_format)
    whole = compute_experts(rows, view, kernel=Kernel.NATIVE)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            for count in (1, 2, 3, 4, 5, 6, 7, 64, 129, 130):
                some = Rows(rows.x_RD, rows.row_ids[:count], torch.tensor([0, 0, count, count]))
                assert torch.equal(compute_experts(some, view, kernel=Kernel.NATIVE), whole[:count])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_experts_err_by_at_most_1_5_of_torchs_error_and_keep_their_bits(form: str) -> None:
    """Inner widths that end within a vector, in the middle of one and with it."""
    for inner in (32, 33, 45, 48):
        case = make_case(*MIXED, hidden=71, inner=inner, form=FORMS[form], bias=True, dtype=torch.bfloat16)
        wide = case.to(torch.float64)
        oracle = compute_experts(wide.rows, wide.view, kernel=Kernel.REFERENCE)
        ours, torchs = (
            compute_experts(case.rows, case.view, kernel=kernel) for kernel in (Kernel.NATIVE, Kernel.TORCH)
        )
        assert ours.dtype is torch.bfloat16
        assert (ours.double() - oracle).norm() <= 1.5 * (torchs.double() - oracle).norm()
        first = Rows(case.x_RD, case.row_ids[:1], case.offsets.clamp(max=1))
        assert torch.equal(compute_experts(first, case.view, kernel=Kernel.NATIVE), ours[:1])


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_slot_table_moves_experts_and_absent_ones_give_zeros(weight_format: str) -> None:
    case = make_case(*MIXED, hidden=40, inner=33, bias=True).with_format(weight_format)
    whole = compute_experts(case.rows, case.view, kernel=Kernel.NATIVE)
    moved = case.with_slots([3, -1, 0, 2], 5)
    expected = whole.clone()
    expected[case.offsets[1] : case.offsets[2]] = 0
    assert torch.equal(compute_experts(moved.rows, moved.view, kernel=Kernel.NATIVE), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    calls = [make_call(9, FORMS["swiglu"], weight_format) for weight_format in FORMATS]
    before = [compute_experts(*call, kernel=Kernel.NATIVE) for call in calls]
    torch.set_default_dtype(dtype)
    try:
        after = [compute_experts(*call, kernel=Kernel.NATIVE) for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(before, after, strict=True):
        assert one.dtype is other.dtype is torch.float32
        assert torch.equal(one, other)


def test_biases_need_not_be_contiguous() -> None:
    rows, view = make_call(9, FORMS["swiglu"], "float32")
    wide = torch.randn(3, 280)
    strided = replace(view, gate_up_bias_SF=wide[:, ::2], down_bias_SD=torch.ones(1, 1).expand(3, 40))
    packed = replace(view, gate_up_bias_SF=wide[:, ::2].contiguous(), down_bias_SD=torch.ones(3, 40))
    assert torch.equal(*(compute_experts(rows, each, kernel=Kernel.NATIVE) for each in (strided, packed)))


def test_indices_need_not_be_contiguous() -> None:
    rows, view = make_call(9, FORMS["swiglu"], "float32")
    slots = torch.tensor([2, 0, 1])
    packed = (torch.tensor([8, 3, 5, 0, 1, 2]), torch.tensor([0, 1, 3, 6]), slots)
    strided = [torch.stack([index, index + 1], dim=1)[:, 0] for index in packed]
    assert not any(index.is_contiguous() for index in strided)
    results = [
        compute_experts(
            Rows(rows.x_RD, row_ids, offsets), replace(view, slot_of_expert=each), kernel=Kernel.NATIVE
        )
        for row_ids, offsets, each in (packed, strided)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("row_ids", "offsets", "slots"),
    [
        ([0, 1], [1, 1, 2, 2], [0, 1, 2]),
        ([0, 9], [0, 0, 2, 2], [0, 1, 2]),
        ([0, -1], [0, 0, 2, 2], [0, 1, 2]),
        ([0, 1], [0, 2, 1, 2], [0, 1, 2]),
        ([0, 1], [0, 0, 1, 1], [0, 1, 2]),
        ([0, 1], [0, 0, 3, 3], [0, 1, 2]),
        ([0, 1], [0, 0, 2, 2], [0, 3, 2]),
    ],
)
def test_indices_out_of_range_are_refused(row_ids: list[int], offsets: list[int], slots: list[int]) -> None:
    rows, view = make_call(9, FORMS["swiglu"], "float32")
    wrong = Rows(rows.x_RD, torch.tensor(row_ids), torch.tensor(offsets))
    with pytest.raises(
        ShapeError, match=r"row_ids must be in 0\.\.8, slots in -1\.\.2, and offsets must rise"
    ):
        compute_experts(wrong, replace(view, slot_of_expert=torch.tensor(slots)), kernel=Kernel.NATIVE)


def test_extreme_gates_have_no_sigmoid_left() -> None:
    view = BankView(torch.ones(1, 2, 1), torch.ones(1, 1, 1))
    rows = Rows(torch.tensor([[-1e18], [-100.0]]), torch.arange(2), torch.tensor([0, 2]))
    assert compute_experts(rows, view, kernel=Kernel.NATIVE).abs().max() < 1e-30


def test_there_is_one_openmp_runtime() -> None:
    assert native.find_obstacle() is None
    assert len(find_openmp_runtimes()) == 1


def test_a_library_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESYS_CACHE", str(tmp_path))
    build_library(LEVELS[-1]).chmod(0o777)
    with pytest.raises(KernelError, match="can be written by others, so its native kernels are not loaded"):
        build_library(LEVELS[-1])


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
    with pytest.raises(KernelError, match=r"could not be built: .*; set MOESYS_CACHE to a writable folder"):
        build_library(LEVELS[-1])


def test_an_unknown_level_lists_what_this_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESYS_CPU_LEVEL", "mmx")
    with pytest.raises(KernelError, match=r"MOESYS_CPU_LEVEL is 'mmx'; this CPU has .*baseline"):
        find_cpu_level()


def test_reading_memory_reads_all_of_it() -> None:
    assert native.read_memory(torch.ones(1 << 18)) == 1 << 18
