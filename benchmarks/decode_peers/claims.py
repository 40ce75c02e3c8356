"""What is promised of offloaded inference, case by case, as `harness.Claim`s.

A policy share needs a routing that can be foreseen at all: where every expert is as likely as any other, nothing that
does not know the future comes near a cache that does. It is claimed of recorded routing, and shown for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import harness
from decode_peers import LLAMA, OURS, RESIDENT
from decode_peers.measures import (
    Record,
    compute_gemm_share,
    compute_read_share,
    compute_ring_ratio,
    compute_speeds,
    compute_transfer_share,
    has_phase,
)
from decode_peers.workload import Case, Feed, Phase
from harness import Claim, Measured
from make_checkpoint import CheckpointShape

READ_FLOOR, READ_GOAL = 0.75, 0.90
POLICY_FLOOR, POLICY_GOAL = 0.80, 0.90
TRANSFER_FLOOR, TRANSFER_GOAL = 0.75, 0.95
GEMM_FLOOR = 0.60
RING_FLOOR, RING_GOAL = 1.15, 1.05
LLAMA_FLOORS = {("ram", 1): 1.15, ("ram", 8): 1.0, ("capped", 1): 1.15, ("capped", 8): 1.5}
"""By part and batch, for bf16."""
GROWTH_BYTES = 2**20
"""What steady decoding may add to the process: nothing but the allocator's own bookkeeping."""


def make_claims(case: Case, measured: Measured, shape: CheckpointShape) -> list[Claim]:
    """The claims of a case, those of absent systems as skipped."""
    part = case.name.split("/")[0]
    if OURS not in case.systems:
        return []
    claims = [claim for phase in case.phases for claim in _claim_phase(part, case, phase, measured, shape)]
    if case.cap_bytes is not None:
        claims.append(
            _claim(
                f"{case.name}/memory",
                measured,
                1.0,
                lambda record: record["peak_bytes"] / record["cap_bytes"],
                better_lower=True,
            )
        )
    return claims


def _claim_phase(
    part: str, case: Case, phase: Phase, measured: Measured, shape: CheckpointShape
) -> Iterator[Claim]:
    name = f"{case.name}/{phase.name.replace(' ', '_')}"
    if part == "ring":
        yield _claim_ring(name, measured, phase, 2 * shape.num_parameters)
        return
    if not phase.num_steps:
        yield _claim(
            f"{name}/share_of_gemm",
            measured,
            GEMM_FLOOR,
            lambda record: compute_gemm_share(record, phase, shape),
        )
        return
    if phase.feed is Feed.GREEDY:
        return
    if part == "ram" and phase.batch == 1:
        yield _claim(
            f"{name}/share_of_memory",
            measured,
            READ_FLOOR,
            lambda record: compute_read_share(record, phase, case, shape),
            READ_GOAL,
        )
    if part == "capped":
        yield _claim(
            f"{name}/transfer_share",
            measured,
            TRANSFER_FLOOR,
            lambda record: compute_transfer_share(record, phase, case, shape),
            TRANSFER_GOAL,
            phase,
        )
    if phase.feed is Feed.REPLAY:
        yield _claim(
            f"{name}/policy_share",
            measured,
            POLICY_FLOOR,
            lambda record: record["phases"][phase.name]["traffic"]["policy_share"],
            POLICY_GOAL,
            phase,
        )
    elif (floor := LLAMA_FLOORS.get((part, phase.batch))) is not None and case.form == "bf16":
        yield _claim_speed(f"{name}/over_llama.cpp", measured, phase, floor)
    yield _claim(
        f"{name}/growth",
        measured,
        1.0,
        lambda record: max(0, record["phases"][phase.name]["growth_bytes"]) / GROWTH_BYTES,
        phase=phase,
        better_lower=True,
    )


def _claim(
    name: str,
    measured: Measured,
    floor: float,
    compute: Callable[[Record], float],
    goal: float | None = None,
    phase: Phase | None = None,
    *,
    better_lower: bool = False,
) -> Claim:
    """phase: one that our own process may have had to leave out."""
    better = "lower" if better_lower else "higher"
    if OURS not in measured.records:
        return Claim(name, floor, goal=goal, better=better, missing=OURS)
    if phase is not None and not has_phase(measured, OURS, phase):
        return Claim(name, floor, goal=goal, better=better, missing=f"{phase.feed}")
    values = tuple(compute(record) for record in measured.records[OURS])
    return Claim(name, floor, values, goal, better)


def _claim_speed(name: str, measured: Measured, phase: Phase, floor: float) -> Claim:
    missing = next((system for system in (OURS, LLAMA) if system not in measured.records), None)
    if missing is not None:
        return Claim(name, floor, missing=missing)
    ours, theirs = (compute_speeds(measured, system, phase) for system in (OURS, LLAMA))
    return Claim(name, floor, harness.pair_ratios(ours, theirs))


def _claim_ring(name: str, measured: Measured, phase: Phase, model_bytes: int) -> Claim:
    full = f"{name}/over_bound"
    missing = next((system for system in (OURS, RESIDENT) if system not in measured.records), None)
    if missing is not None:
        return Claim(full, RING_FLOOR, goal=RING_GOAL, better="lower", missing=missing)
    pairs = zip(measured.records[OURS], measured.records[RESIDENT], strict=True)
    ratios = tuple(compute_ring_ratio(ours, resident, phase, model_bytes) for ours, resident in pairs)
    return Claim(full, RING_FLOOR, ratios, RING_GOAL, "lower")


def find_disagreements(case: Case, measured: Measured) -> list[str]:
    """Returns a line for each system whose likeliest tokens after the prompts mostly differ from ours: one of the two
    decoded another model. Some may: bf16 flips near ties."""
    lines = []
    for phase in case.phases:
        found = {
            system: records[0]["phases"][phase.name]["favourites"]
            for system, records in measured.records.items()
            if has_phase(measured, system, phase)
        }
        if OURS not in found:
            continue
        for system, tokens in found.items():
            same = sum(ours == theirs for ours, theirs in zip(found[OURS], tokens, strict=True))
            if 2 * same < len(tokens):
                lines.append(
                    f"{case.name}, {phase.name}: the likeliest tokens after the prompts are {found[OURS]} for {OURS} "
                    f"and {tokens} for {system}; they are not of one model"
                )
    return lines
