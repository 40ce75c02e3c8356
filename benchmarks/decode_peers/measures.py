"""Numbers of a case's records, one per pass: speeds, shares of ceilings, traffic. Pure arithmetic on plain data.

Without a cap a step takes its median, since steps differ by other guests of the machine only. With one it takes its
mean: steps that wait for the disk are what is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from decode_peers.traffic import find_bound
from decode_peers.workload import Case, Phase, count_prefill_flops, count_token_bytes
from harness import Measured, Spread
from make_checkpoint import CheckpointShape

Record = Mapping[str, Any]
"""Of one process, as the worker prints it."""


def has_phase(measured: Measured, system: str, phase: Phase) -> bool:
    """Whether every pass of a system went through a phase."""
    records = measured.records.get(system, [])
    return bool(records) and all(phase.name in record["phases"] for record in records)


def compute_step_seconds(record: Record, phase: Phase) -> float:
    seconds = record["phases"][phase.name]["step_seconds"]
    return statistics.median(seconds) if record["cap_bytes"] is None else statistics.mean(seconds)


def compute_speed(record: Record, phase: Phase) -> float:
    """Tokens per second: of the prompt, or of all sequences together."""
    if not phase.num_steps:
        return phase.batch * phase.prompt_tokens / record["phases"][phase.name]["prefill_seconds"]
    return phase.batch / compute_step_seconds(record, phase)


def compute_speeds(measured: Measured, system: str, phase: Phase) -> list[float]:
    """Of every pass."""
    return [compute_speed(record, phase) for record in measured.records[system]]


def compute_read_share(record: Record, phase: Phase, case: Case, shape: CheckpointShape) -> float:
    """Of the memory's read rate, for one sequence: the bytes that a token needs, over the time that it took."""
    seconds = compute_step_seconds(record, phase)
    return count_token_bytes(shape, case.form) / seconds / record["ceilings"]["memory"]


def compute_gemm_share(record: Record, phase: Phase, shape: CheckpointShape) -> float:
    seconds = record["phases"][phase.name]["prefill_seconds"]
    return count_prefill_flops(shape, phase.prompt_tokens) / seconds / record["ceilings"]["gemm"]


def find_disk_rate(record: Record) -> float:
    """Bytes per second of the fastest way to read that was measured around the run."""
    return max(rate for name, rate in record["ceilings"].items() if name not in ("memory", "gemm"))


def compute_transfer_share(record: Record, phase: Phase, case: Case, shape: CheckpointShape) -> float:
    """Of the longer of a step's two terms, the disk's and the memory's, in the time that the step took."""
    timed = record["phases"][phase.name]
    seconds = sum(timed["step_seconds"])
    disk_seconds = timed["traffic"]["used_bytes"] / find_disk_rate(record)
    memory_seconds = (
        len(timed["step_seconds"]) * count_token_bytes(shape, case.form) / record["ceilings"]["memory"]
    )
    terms = {"disk": disk_seconds, "memory": memory_seconds}
    return terms[find_bound(disk_seconds, memory_seconds)] / seconds


def compute_ring_ratio(record: Record, resident: Record, phase: Phase, model_bytes: int) -> float:
    """Seconds of a prompt under a cap ÷ the longer of what it takes in memory and what reading the model takes."""
    capped_s, resident_s = (one["phases"][phase.name]["prefill_seconds"] for one in (record, resident))
    return capped_s / max(resident_s, model_bytes / find_disk_rate(record))


def compute_rates(measured: Measured) -> dict[str, Spread]:
    """The ceilings of all processes that measured them, by name; bytes or operations per second."""
    found: dict[str, list[float]] = {}
    for records in measured.records.values():
        for record in records:
            for name, rate in record["ceilings"].items():
                found.setdefault(name, []).append(rate)
    return {name: Spread.of(rates) for name, rates in found.items()}
