"""One system on one task, in a process of its own: opens it, goes through the phases, and says what it took.

Our own process also measures the ceilings, around what is measured against them: the machine drifts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import harness
from decode_peers import OURS, RESIDENT, SYSTEMS, Decoding, UnavailableError, ceilings, load_opener
from decode_peers.workload import WARM_STEPS, Feed, Phase, Task, draw_prompts, draw_steps
from memory_cap import CapUnavailableError, memory_cap
from process_memory import PeakOwnMemory, read_disk_bytes, read_own_bytes

PHASE_SECONDS = 20.0
"""No step begins after so many, but for the first few."""
MIN_STEPS = 3


def measure(system: str, task: Task) -> dict[str, Any]:
    """Returns the record of the process; ``{"skipped": reason}`` where the system cannot run here."""
    try:
        return _measure(system, task)
    except (UnavailableError, CapUnavailableError) as reason:
        return {"skipped": str(reason)}


def _measure(system: str, task: Task) -> dict[str, Any]:
    open_system = load_opener(system)
    cap_bytes = task.cap_bytes if SYSTEMS[system].is_capped else None
    is_ours = system in (OURS, RESIDENT)
    before = _measure_ceilings(task, cap_bytes is not None) if is_ours else {}
    ceilings.drop([path for path in task.files.list_files() if path.exists()])
    with nullcontext() if cap_bytes is None else memory_cap(cap_bytes):
        gc.collect()
        memory = PeakOwnMemory()
        started = time.perf_counter()
        with open_system(SYSTEMS[system].variant, task) as decoding:
            open_seconds = time.perf_counter() - started
            phases = [
                measure_phase(decoding, phase, task)
                for phase in task.phases
                if is_ours or phase.feed is not Feed.REPLAY
            ]
        peak_bytes = memory.stop()
    after = _measure_ceilings(task, cap_bytes is not None) if is_ours else {}
    return {
        "open_seconds": open_seconds,
        "peak_bytes": peak_bytes,
        "cap_bytes": cap_bytes,
        "phases": {phase["name"]: phase for phase in phases},
        "ceilings": {name: max(before[name], after[name]) for name in before},
    }


def measure_phase(decoding: Decoding, phase: Phase, task: Task) -> dict[str, Any]:
    """Reads the prompts, warms up, then times steps."""
    vocab_size = task.files.shape.vocab_size
    prompts = draw_prompts(phase, vocab_size, task.seed)
    started = time.perf_counter()
    favourites = decoding.begin(phase, prompts)
    record: dict[str, Any] = {
        "name": phase.name,
        "prefill_seconds": time.perf_counter() - started,
        "favourites": favourites,
    }
    if not phase.num_steps:
        return record
    drawn = draw_steps(phase, vocab_size, task.seed)
    next_tokens = favourites
    for tokens in drawn[:WARM_STEPS]:
        next_tokens = decoding.step(choose(phase, tokens, next_tokens))
    decoding.mark()
    own_bytes, disk_bytes = read_own_bytes(), read_disk_bytes()
    seconds: list[float] = []
    for tokens in drawn[WARM_STEPS:]:
        if len(seconds) >= MIN_STEPS and sum(seconds) > PHASE_SECONDS:
            break
        started = time.perf_counter()
        next_tokens = decoding.step(choose(phase, tokens, next_tokens))
        seconds.append(time.perf_counter() - started)
    growth_bytes, read_bytes = read_own_bytes() - own_bytes, read_disk_bytes() - disk_bytes
    traffic = decoding.count_traffic()
    return {
        **record,
        "step_seconds": seconds,
        "growth_bytes": growth_bytes,
        "disk_bytes": read_bytes,
        "traffic": None if traffic is None else traffic.record,
    }


def choose(phase: Phase, drawn: Sequence[int], likeliest: Sequence[int]) -> Sequence[int]:
    """Returns the tokens that a step is fed."""
    return likeliest if phase.feed is Feed.GREEDY else drawn


def _measure_ceilings(task: Task, with_disk: bool) -> dict[str, float]:
    from moesys.planning import measure_memory_read_rate

    rates = {"memory": measure_memory_read_rate()}
    if any(not phase.num_steps for phase in task.phases):
        rates["gemm"] = harness.measure_gemm_flops("float32")
    if with_disk:
        rates |= ceilings.measure_disk_rates(sorted(task.files.folder.glob("*.safetensors")), task.seed)
    return rates
