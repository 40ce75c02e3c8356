"""Seconds of a step, from measured rates and from what a token does: the arithmetic behind every promise of speed.

Pure functions of plain numbers. A prediction takes the rates of the kernels and follows the engine's own order of
reading and computing; a bound takes the best rates of the machine and lets everything overlap with everything.

In formulas: c tokens in a step, L MoE layers of E experts of w bytes, k of them per token, h the share of uses found in
memory, B the rates of memory and disk, F that of arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from moesys.planning.activity import Activity
from moesys.planning.ceilings import WeightFormat
from moesys.planning.machine_profile import MachineProfile, ReadWay

_GEMM_DTYPES = {
    WeightFormat.FP32: ("fp32",),
    WeightFormat.BF16: ("fp32", "bf16"),
    WeightFormat.INT8: ("fp32", "bf16"),
}
"""As which products of weights in a format may be computed."""


class Bound(StrEnum):
    """What a step cannot be faster than."""

    MEMORY = "memory"
    DISK = "disk"
    ARITHMETIC = "arithmetic"


@dataclass(frozen=True)
class StepRates:
    """What a step runs at, per second.

    overhead_s:  of every layer, besides.
    """

    memory_bytes_per_s: float
    flops_per_s: float
    disk_bytes_per_s: float
    overhead_s: float = 0.0


@dataclass(frozen=True)
class StepWork:
    """What a step has to do.

    flops:         of which ``num_tokens`` tokens share the weights.
    missed_bytes:  of experts that come from the disk.
    """

    num_tokens: int
    core_bytes: float
    core_flops: float
    expert_bytes: float
    expert_flops: float
    missed_bytes: float
    kv_bytes: float
    attention_flops: float


@dataclass(frozen=True)
class BoundTimes:
    """Seconds that a step takes at least, by what limits it. Each may overlap with the others."""

    memory_s: float
    disk_s: float
    arithmetic_s: float

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.disk_s, self.arithmetic_s)

    @property
    def bound(self) -> Bound:
        """The one that takes longest."""
        times = {Bound.MEMORY: self.memory_s, Bound.DISK: self.disk_s, Bound.ARITHMETIC: self.arithmetic_s}
        return max(times, key=times.__getitem__)


def find_kernel_rates(
    profile: MachineProfile, weight_format: WeightFormat, way: ReadWay, section_bytes: int
) -> StepRates:
    """Returns what our kernels reach, and a way to read sections of such a size at random, each alone."""
    return StepRates(
        memory_bytes_per_s=profile.weight_read_bytes_per_s[weight_format],
        flops_per_s=profile.linear_flops_per_s[weight_format],
        disk_bytes_per_s=profile.find_section_rate(way, section_bytes),
        overhead_s=profile.layer_overhead_s,
    )


def find_stream_rates(
    profile: MachineProfile, weight_format: WeightFormat, way: ReadWay, section_bytes: int
) -> StepRates:
    """Returns what our kernels reach with many rows, and a way to read sections of a size, each alone. Experts are read
    one by one in passes too: what a disk gives to whoever reads a file from end to end is not theirs."""
    return StepRates(
        memory_bytes_per_s=profile.weight_read_bytes_per_s[weight_format],
        flops_per_s=profile.linear_flops_per_s[weight_format],
        disk_bytes_per_s=profile.find_section_rate(way, section_bytes),
        overhead_s=profile.layer_overhead_s,
    )


def slow_down(alone: StepRates, profile: MachineProfile) -> StepRates:
    """Returns what is left of rates while disk and CPU are both busy: of each the share that was left of it when that
    was measured."""
    reading = profile.find_best_read(profile.overlap_section_bytes).bytes_per_s
    return replace(
        alone,
        memory_bytes_per_s=alone.memory_bytes_per_s
        * min(1.0, profile.memory_overlap.work_per_s / profile.memory_read_bytes_per_s),
        flops_per_s=alone.flops_per_s
        * min(1.0, profile.gemm_overlap.work_per_s / profile.gemm_flops_per_s["fp32"]),
        disk_bytes_per_s=alone.disk_bytes_per_s * min(1.0, profile.gemm_overlap.disk_bytes_per_s / reading),
    )


def find_ceilings(profile: MachineProfile, weight_format: WeightFormat) -> StepRates:
    """Returns the most that the machine gives, whatever the kernels and the way to read."""
    gemm = [profile.gemm_flops_per_s[name] for name in _GEMM_DTYPES[weight_format]]
    return StepRates(
        memory_bytes_per_s=max(
            profile.memory_read_bytes_per_s, profile.weight_read_bytes_per_s[weight_format]
        ),
        flops_per_s=max(*gemm, profile.linear_flops_per_s[weight_format]),
        disk_bytes_per_s=max(rate.bytes_per_s for rate in profile.disk_rates),
    )


def compute_bound(work: StepWork, rates: StepRates) -> BoundTimes:
    """Returns the least seconds of a step: T >= (core + experts + KV) / B_memory, T >= (1 - h) E_c L w / B_disk and
    T >= flops / F (the physical limits of decoding and prefill, each byte once and everything overlapped)."""
    return BoundTimes(
        memory_s=(work.core_bytes + work.expert_bytes + work.kv_bytes) / rates.memory_bytes_per_s,
        disk_s=work.missed_bytes / rates.disk_bytes_per_s,
        arithmetic_s=(work.core_flops + work.expert_flops + work.attention_flops) / rates.flops_per_s,
    )


def compute_decode_seconds(work: StepWork, activity: Activity, rates: StepRates) -> float:
    """Returns the seconds of a step in which a layer's misses are read once its routing is known:

    T = sum over layers of [ core + max(experts, misses + one expert's computing) + o ],

    for while misses are read those experts are computed that are there, or have come, and the last one to come is
    computed after. Layers form a chain: nothing of one overlaps with the next.
    """
    num_layers = max(len(activity.layers), 1)
    core_s = max(work.core_bytes / rates.memory_bytes_per_s, work.core_flops / rates.flops_per_s)
    core_s += max(work.kv_bytes / rates.memory_bytes_per_s, work.attention_flops / rates.flops_per_s)
    experts_s = max(work.expert_bytes / rates.memory_bytes_per_s, work.expert_flops / rates.flops_per_s)
    reads_s = work.missed_bytes / rates.disk_bytes_per_s
    if work.expert_bytes:
        # Of a layer with less than one miss to be expected, as much of an expert is computed after the read.
        one_bytes = max((layer.expert_bytes for layer in activity.layers), default=0)
        last_bytes = min(work.missed_bytes / num_layers, one_bytes) * num_layers
        reads_s += last_bytes * experts_s / work.expert_bytes
    return core_s + max(experts_s, reads_s) + rates.overhead_s * activity.num_layers


def compute_pass_seconds(
    work: StepWork, activity: Activity, alone: StepRates, overlapped: StepRates
) -> float:
    """Returns the seconds of a pass in which layers are read ahead in order, as through a ring.

    With T_c of computing and T_l of reading per layer: max(N T_c + T_l, N T_l + T_c), the first layer's reading and the
    last one's computing overlap with nothing (the ring's model, with an empty ring at the start). Where nothing is read
    the kernels run at the rates that they reach alone.
    """
    if not work.missed_bytes:
        return _compute_pass_work(work, activity, alone)
    num_layers = max(len(activity.layers), 1)
    computing_s = _compute_pass_work(work, activity, overlapped)
    reading_s = work.missed_bytes / overlapped.disk_bytes_per_s
    slower = max(computing_s + reading_s / num_layers, reading_s + computing_s / num_layers)
    # What does not overlap runs at its full rate, so that taking turns is never slower than this.
    in_turns = _compute_pass_work(work, activity, alone) + work.missed_bytes / alone.disk_bytes_per_s
    return min(slower, in_turns)


def _compute_pass_work(work: StepWork, activity: Activity, rates: StepRates) -> float:
    core_s = max(work.core_bytes / rates.memory_bytes_per_s, work.core_flops / rates.flops_per_s)
    experts_s = max(work.expert_bytes / rates.memory_bytes_per_s, work.expert_flops / rates.flops_per_s)
    attention_s = max(work.kv_bytes / rates.memory_bytes_per_s, work.attention_flops / rates.flops_per_s)
    return core_s + experts_s + attention_s + rates.overhead_s * activity.num_layers
