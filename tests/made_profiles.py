"""Machines that do not exist, with round numbers, for tests of what is computed from a machine's rates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moesys.planning.ceilings import WeightFormat
from moesys.planning.disk_rate import DiskRate, ReadPattern
from moesys.planning.machine import Disk, Machine
from moesys.planning.machine_profile import MachineProfile, Overlap
from moesys.store import ReadMode

MIB = 2**20
GIGA = 10**9

MACHINE = Machine("Abacus 9000", num_cores=4, num_threads=4, kernels="native avx2")
DISK = Disk("/dev/drum", "ext4")


def make_rate(
    mode: ReadMode,
    depth: int,
    bytes_per_s: float,
    section_bytes: int = 4 * MIB,
    *,
    is_sequential: bool = False,
) -> DiskRate:
    return DiskRate(ReadPattern(mode, section_bytes, depth, is_sequential), bytes_per_s)


def make_profile(**changes: Any) -> MachineProfile:
    """Memory 10 GB/s and 8 through our kernels; 200 GFLOP/s and 100 through our kernels; sections at 1 GB/s with one
    piece in flight and 2 with four, both 2 in order; nothing loses anything by overlapping."""
    profile = MachineProfile(
        machine=MACHINE,
        disk=DISK,
        probe="a file",
        measured_on="2026-01-02T03:04:05+00:00",
        memory_read_bytes_per_s=10.0 * GIGA,
        gemm_flops_per_s={"fp32": 200.0 * GIGA, "bf16": 50.0 * GIGA},
        weight_read_bytes_per_s=dict.fromkeys(WeightFormat, 8.0 * GIGA),
        linear_flops_per_s=dict.fromkeys(WeightFormat, 100.0 * GIGA),
        layer_overhead_s=0.0,
        disk_rates=(
            make_rate(ReadMode.BUFFERED, 1, 1.0 * GIGA),
            make_rate(ReadMode.DIRECT, 4, 2.0 * GIGA),
            make_rate(ReadMode.BUFFERED, 1, 2.0 * GIGA, is_sequential=True),
            make_rate(ReadMode.DIRECT, 4, 2.0 * GIGA, is_sequential=True),
        ),
        direct_obstacle=None,
        overlap_section_bytes=4 * MIB,
        memory_overlap=Overlap(2.0 * GIGA, 10.0 * GIGA),
        gemm_overlap=Overlap(2.0 * GIGA, 200.0 * GIGA),
    )
    return replace(profile, **changes)
