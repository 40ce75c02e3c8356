"""What ``moesys doctor`` prints: lines of at most 80 columns, or one object for programs with units in its names."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesys.planning.environment import Advice, Environment
from moesys.planning.machine_profile import MachineProfile
from moesys.units import format_bytes

_WIDTH = 80


def render_doctor(
    found: Environment, profile: MachineProfile, advice: Sequence[Advice], file: Path
) -> Iterator[str]:
    """Yields the lines for people."""
    yield from _render_machine(found)
    yield ""
    yield from _render_ceilings(profile)
    yield ""
    yield from _render_disk(profile)
    yield ""
    if not advice:
        yield "nothing to mend"
    for each in advice:
        yield from textwrap.wrap(f"! {each.what}", _WIDTH, subsequent_indent="  ")
        yield from textwrap.wrap(f"fix: {each.fix}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    yield f"saved in {file}"


def encode_doctor(
    found: Environment, profile: MachineProfile, advice: Sequence[Advice], file: Path
) -> dict[str, Any]:
    """Returns the object for programs."""
    return {
        "environment": asdict(found),
        "profile": asdict(profile),
        "advice": [asdict(each) for each in advice],
        "file": str(file),
    }


def _render_machine(found: Environment) -> Iterator[str]:
    machine = found.machine
    yield _row("CPU", f"{machine.cpu}, {machine.num_cores} cores, {machine.num_threads} threads")
    yield _row("RAM", format_bytes(found.ram_bytes))
    yield _row("GPU", found.gpu or "none that torch can use")
    yield _row("kernels", f"{machine.kernels}, torch {found.torch_version}")
    yield _row("disk", f"{found.disk.device} ({found.disk.file_system})")


def _render_ceilings(profile: MachineProfile) -> Iterator[str]:
    read, gemm = profile.memory_read_bytes_per_s, profile.gemm_flops_per_s
    yield f"  {'ceilings':<34}{'alone':>12}{'with the disk busy':>22}"
    yield _pair(
        "memory read", f"{read / 1e9:.1f} GB/s", f"{profile.memory_overlap.work_per_s / 1e9:.1f} GB/s"
    )
    yield _pair(
        "matrix products, fp32",
        f"{gemm['fp32'] / 1e9:.0f} GFLOP/s",
        f"{profile.gemm_overlap.work_per_s / 1e9:.0f} GFLOP/s",
    )
    yield _pair("matrix products, bf16", f"{gemm['bf16'] / 1e9:.0f} GFLOP/s", "")
    for form, rate in profile.weight_read_bytes_per_s.items():
        flops = f"{profile.linear_flops_per_s[form] / 1e9:.0f} GFLOP/s"
        yield _pair(f"our kernels, {form}: one row", f"{rate / 1e9:.1f} GB/s", "")
        yield _pair(f"our kernels, {form}: many rows", flops, "")
    yield _pair("an empty layer", f"{profile.layer_overhead_s * 1e6:.0f} us", "")


def _render_disk(profile: MachineProfile) -> Iterator[str]:
    """Yields a table of rates in GB/s: a line per mode and size of sections, a column per depth."""
    depths = sorted({rate.pattern.depth for rate in profile.disk_rates})
    yield f"  {'disk, GB/s, pieces in flight':<34}" + "".join(f"{depth:>8}" for depth in depths)
    rates = {
        (rate.pattern.mode, rate.pattern.is_sequential, rate.pattern.section_bytes, rate.pattern.depth): rate
        for rate in profile.disk_rates
    }
    for mode, is_sequential, size in dict.fromkeys(key[:3] for key in rates):
        name = "in order" if is_sequential else f"{format_bytes(size)} anywhere"
        cells = (rates.get((mode, is_sequential, size, depth)) for depth in depths)
        texts = ("" if cell is None else f"{cell.bytes_per_s / 1e9:.2f}" for cell in cells)
        yield (f"  {f'{mode}, {name}':<34}" + "".join(f"{text:>8}" for text in texts)).rstrip()
    best = profile.find_best_read(profile.overlap_section_bytes)
    pattern, overlap = best.pattern, profile.memory_overlap
    yield _row(
        "fastest",
        f"{pattern.mode}, {pattern.depth} in flight: {best.bytes_per_s / 1e9:.2f} GB/s for "
        f"{format_bytes(pattern.section_bytes)}",
    )
    yield _row(
        "",
        f"{overlap.disk_bytes_per_s / 1e9:.2f} with memory busy, "
        f"{profile.gemm_overlap.disk_bytes_per_s / 1e9:.2f} with matrix products",
    )
    yield from textwrap.wrap(
        f"  read: {profile.probe}", _WIDTH, subsequent_indent="    ", break_on_hyphens=False
    )


def _row(name: str, text: str) -> str:
    return f"  {name:<10}{text}"


def _pair(name: str, alone: str, together: str) -> str:
    return f"  {name:<34}{alone:>12}{together:>22}".rstrip()
