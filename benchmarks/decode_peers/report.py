"""Tables of a case for people, and what a plot shows."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import harness
from decode_peers import OURS, RESIDENT
from decode_peers.measures import (
    Record,
    compute_gemm_share,
    compute_rates,
    compute_read_share,
    compute_speeds,
    compute_transfer_share,
    has_phase,
)
from decode_peers.workload import Case, Phase
from harness import Measured, Spread
from make_checkpoint import CheckpointShape

HEADER = ("system", "phase", "tokens/s", "10-90 %", "of ceiling", "policy", "disk GB/token", "peak GiB")


def format_case(case: Case, measured: Measured, shape: CheckpointShape) -> str:
    """A row per phase and system, what our experts cost beside other policies, and the ceilings."""
    rows = [
        _format_row(case, phase, system, measured, shape)
        for phase in case.phases
        for system in case.systems
        if has_phase(measured, system, phase)
    ]
    cap = "" if case.cap_bytes is None else f" within {case.cap_bytes / 2**30:.2f} GiB"
    lines = [f"{case.name}{cap}", harness.format_table(HEADER, rows), *measured.absence_lines]
    lines += [line for phase in case.phases if (line := _format_traffic(phase, measured)) is not None]
    rates = ", ".join(
        f"{name} {rate.median / 1e9:.2f} ({rate.low / 1e9:.2f}-{rate.high / 1e9:.2f})"
        for name, rate in compute_rates(measured).items()
    )
    if rates:
        lines.append(f"ceilings in GB/s or GFLOP/s: {rates}")
    return "\n".join(lines)


def compute_speed_spreads(case: Case, measured: Measured) -> dict[str, Spread]:
    """Tokens per second by system and phase."""
    return {
        f"{system}, {phase.name}": Spread.of(compute_speeds(measured, system, phase))
        for phase in case.phases
        for system in case.systems
        if has_phase(measured, system, phase)
    }


def _format_row(
    case: Case, phase: Phase, system: str, measured: Measured, shape: CheckpointShape
) -> tuple[str, ...]:
    records = measured.records[system]
    speed = Spread.of(compute_speeds(measured, system, phase))
    share = _find_share(case, phase, system, records[0], shape)
    ceiling = "" if share is None else f"{statistics.median(share(record) for record in records):.0%}"
    timed = [record["phases"][phase.name] for record in records]
    policy = disk = ""
    if phase.num_steps:
        per_token = [one["disk_bytes"] / len(one["step_seconds"]) / phase.batch for one in timed]
        disk = f"{statistics.median(per_token) / 1e9:.3f}"
        if timed[0]["traffic"] is not None:
            policy = f"{statistics.median(one['traffic']['policy_share'] for one in timed):.0%}"
    peak = statistics.median(record["peak_bytes"] for record in records)
    return (
        system,
        phase.name,
        f"{speed.median:.2f}",
        f"{speed.low:.2f}-{speed.high:.2f}",
        ceiling,
        policy,
        disk,
        f"{peak / 2**30:.2f}",
    )


def _find_share(
    case: Case, phase: Phase, system: str, record: Record, shape: CheckpointShape
) -> Callable[[Record], float] | None:
    """Returns what a phase is measured against: arithmetic, the longer of memory and disk, or nothing."""
    if system not in (OURS, RESIDENT):
        return None
    if not phase.num_steps:
        return lambda one: compute_gemm_share(one, phase, shape)
    if record["phases"][phase.name]["traffic"] is not None:
        return lambda one: compute_transfer_share(one, phase, case, shape)
    return (lambda one: compute_read_share(one, phase, case, shape)) if phase.batch == 1 else None


def _format_traffic(phase: Phase, measured: Measured) -> str | None:
    if not phase.num_steps or not has_phase(measured, OURS, phase):
        return None
    timed = measured.records[OURS][-1]["phases"][phase.name]
    traffic = timed["traffic"]
    if traffic is None:
        return None
    steps = len(timed["step_seconds"])
    others = ", ".join(f"{name} {loads / steps:.1f}" for name, loads in traffic["num_replayed"].items())
    per_step = {key: traffic[key] / steps for key in ("num_loads", "num_demands", "num_best")}
    return (
        f"{phase.name}: {per_step['num_loads']:.1f} experts read per step of {per_step['num_demands']:.1f} used; "
        f"a cache that knew the future {per_step['num_best']:.1f}; replayed: {others}"
    )
