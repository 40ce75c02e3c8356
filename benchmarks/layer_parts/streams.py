"""What layers and matrices have in common when they are read at the speed of memory: distinct weights in turn.

A sweep reads at least `DISTINCT_BYTES` of weights before it reads any of them again, so that no cache holds them.
Its rate is weight bytes per second, compared with the rate at which the same process reads plain memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import harness
from harness import Claim, Measured, Spread, Timing
from layer_peers import OURS
from layer_peers.workload import Format
from moesys.planning import measure_memory_read_rate

DISTINCT_BYTES = 2 * 2**30
CLAIMED_FORMATS = (Format.BF16, Format.W8, Format.W8A8)


def record_sweeps(sweeps: Mapping[str, tuple[int, Callable[[], object]]], timing: Timing) -> dict[str, Any]:
    """Times sweeps of (bytes, call) by name. The read rate drifts with the machine's other guests, so it is measured
    before and after each sweep's calls, and the better one is its ceiling."""
    timed = {}
    rate_before = measure_memory_read_rate()
    for name, (num_bytes, sweep) in sweeps.items():
        sweep()
        seconds = harness.time_calls(sweep, timing)
        rate_after = measure_memory_read_rate()
        timed[name] = {"bytes": num_bytes, "seconds": seconds, "read_rate": max(rate_before, rate_after)}
        rate_before = rate_after
    return {"sweeps": timed}


def compute_rates(measured: Measured, system: str, sweep: str) -> list[float]:
    """Weight bytes per second of every sweep, pass by pass."""
    timed = [record["sweeps"][sweep] for record in measured.records[system]]
    return [one["bytes"] / seconds for one in timed for seconds in one["seconds"]]


def compute_read_shares(measured: Measured, system: str, sweep: str) -> list[float]:
    """The same rates as a share of what the process could read around them."""
    timed = [record["sweeps"][sweep] for record in measured.records[system]]
    return [one["bytes"] / seconds / one["read_rate"] for one in timed for seconds in one["seconds"]]


def list_read_rates(measured: Measured) -> list[float]:
    """The ceilings of every process and sweep."""
    records = [record for passes in measured.records.values() for record in passes]
    return [sweep["read_rate"] for record in records for sweep in record.get("sweeps", {}).values()]


def claim_read_share(name: str, measured: Measured, sweep: str, floor: float, goal: float) -> Claim:
    if OURS not in measured.records:
        return Claim(name, floor, goal=goal, missing=OURS)
    return Claim(name, floor, tuple(compute_read_shares(measured, OURS, sweep)), goal)


def list_sweeps(measured: Measured) -> list[tuple[str, str]]:
    """(sweep, system) of everything measured, sweep by sweep."""
    names = dict.fromkeys(name for records in measured.records.values() for name in records[0]["sweeps"])
    return [(name, system) for name in names for system in measured.records]


def format_sweeps(title: str, measured: Measured) -> str:
    rows = []
    for name, system in list_sweeps(measured):
        rate = Spread.of([value / 1e9 for value in compute_rates(measured, system, name)])
        share = Spread.of(compute_read_shares(measured, system, name))
        rows.append(
            (system, name, f"{rate.median:.1f}", f"{rate.low:.1f}-{rate.high:.1f}", f"{share.median:.0%}")
        )
    table = harness.format_table(("system", "call", "GB/s", "10-90 %", "of read rate"), rows)
    return "\n".join([title, table, *measured.absence_lines])


def compute_share_spreads(measured: Measured) -> dict[str, Spread]:
    return {
        f"{system}, {name}": Spread.of(compute_read_shares(measured, system, name))
        for name, system in list_sweeps(measured)
    }
