"""Seconds from a model folder to the first logits, and peak memory, beside transformers; warm and cold.

Every load is a process of its own (this script with ``--worker``), alternating A B B A. Warm: the worker has just read
the files into the page cache. Cold: it has dropped them from there (posix_fadvise) after a sync. How much of them was
really in memory when the clock started is asked of the system (mincore), recorded, and told where it is not what the
name says. The clock starts after the imports, with the folder's path, and stops when the logits of a prompt are there,
because a loader that maps files has done nothing yet when it returns. The disk's rate is measured in the same run by
plain large reads of the same cold files. Peak memory is anonymous and shared memory above the same process before it
loads: pages of mapped files are the system's to take back.

Every load must find the same token the likeliest to follow the prompt: a run in which two differ fails, since one of
them loaded another model.

A virtual machine hands freed memory back to its host within seconds, and gets it again far slower than any loader fills
it. Every worker therefore touches and frees as much as it will need, before it reads or drops the files.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import harness
from harness import Claim, Measured, Outcome, Spread
from make_checkpoint import SHAPES, make_checkpoint
from process_memory import PeakOwnMemory

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("moesys", "torch", "transformers", "accelerate", "safetensors")
OURS = "moesys"
DISK = "disk"
TRANSFORMERS = ("transformers", "transformers-device-map")
SYSTEMS = (OURS, *TRANSFORMERS)
WARM_FLOOR, COLD_FLOOR, DISK_FLOOR = 1.0, 1.5, 0.8
MEMORY_FACTOR, MEMORY_EXTRA_BYTES = 1.02, 256 * 2**20
PROMPT_TOKENS = 16
READERS, READ_BYTES = 4, 16 * 2**20
TOUCHED_BYTES = 2**20
LOOK_EVERY_S = 0.002
ODD_CACHE_SHARE = 0.01
"""Of the files in memory when they should not be, or not when they should, from which on it is told."""

Temperature = Literal["warm", "cold"]
TEMPERATURES: tuple[Temperature, ...] = ("warm", "cold")


@dataclass(frozen=True)
class Plan:
    """What one invocation measures."""

    shape: str
    systems: tuple[str, ...] = SYSTEMS
    rounds: int = 2
    threads: int = 2
    limit_seconds: float = 240.0


FULL = Plan("olmoe-8")
QUICK = Plan("olmoe-2", rounds=1)


@dataclass
class Loads(Measured):
    """The loads of one temperature."""

    temperature: Temperature = field(kw_only=True)

    def collect(self, system: str, what: str) -> list[float]:
        """A number of every load of a system, pass by pass."""
        return [float(record[what]) for record in self.records[system]]

    def spread(self, system: str, what: str) -> Spread:
        return Spread.of(self.collect(system, what))

    @property
    def odd_cache_line(self) -> str | None:
        """What to tell of the page cache where some load did not find it as ``temperature`` says; else None."""
        shares = [float(record["cached_share"]) for records in self.records.values() for record in records]
        if self.temperature == "cold":
            worst = max(shares, default=0.0)
            return (
                f"not cold: up to {worst:.0%} of the files were in memory"
                if worst > ODD_CACHE_SHARE
                else None
            )
        worst = min(shares, default=1.0)
        return (
            f"not warm: only {worst:.0%} of the files were in memory" if worst < 1 - ODD_CACHE_SHARE else None
        )


def measure_worker(system: str, folder: Path, threads: int, temperature: Temperature) -> dict[str, Any]:
    """In a fresh process: imports, then loads the folder and computes the logits of a prompt."""
    if system == DISK:
        cached_share = prepare_cache(folder, temperature)
        return {**measure_disk(folder), "cached_share": cached_share}
    import torch

    torch.set_num_threads(threads)
    if system == OURS:
        start = _prepare_moesys()
    else:
        try:
            start = _prepare_transformers(system)
        except ImportError as error:
            return {"skipped": str(error)}
    torch.mm(torch.zeros(64, 64).bfloat16(), torch.zeros(64, 64).bfloat16())
    tokens = torch.arange(PROMPT_TOKENS).unsqueeze(0) + 7
    cached_share = prepare_cache(folder, temperature)
    memory = PeakOwnMemory(LOOK_EVERY_S)
    started = time.perf_counter()
    compute_logits, weight_bytes = start(folder)
    loaded = time.perf_counter()
    with torch.inference_mode():
        logits = compute_logits(tokens)
    answered = time.perf_counter()
    assert bool(logits.isfinite().all())
    return {
        "load_seconds": loaded - started,
        "first_logits_seconds": answered - started,
        "peak_bytes": memory.stop(),
        "weight_bytes": weight_bytes,
        "favourite": int(logits[-1].argmax()),
        "cached_share": cached_share,
    }


Start = Callable[[Path], tuple[Callable[[Any], Any], int]]
"""Loads a folder; returns a function from (1, length) tokens to (length, vocabulary) logits, and the weights' bytes."""


def _prepare_moesys() -> Start:
    import torch

    from moesys.checkpoint import load_model
    from moesys.models import DocumentAttend

    def start(folder: Path) -> tuple[Callable[[Any], Any], int]:
        model = load_model(folder, torch.bfloat16)

        def compute_logits(tokens: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(tokens.shape[1]).unsqueeze(0)
            return model.compute_logits(model(tokens, positions, DocumentAttend(None)).hidden_BSD[0])

        return compute_logits, sum(p.numel() * p.element_size() for p in model.parameters())

    return start


def _prepare_transformers(system: str) -> Start:
    import torch
    from transformers import OlmoeForCausalLM

    options: dict[str, Any] = {}
    if system == "transformers-device-map":
        import accelerate  # noqa: F401 - what device_map needs

        options["device_map"] = "cpu"

    def start(folder: Path) -> tuple[Callable[[Any], Any], int]:
        model = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
        return (
            lambda tokens: model(tokens).logits[0],
            sum(p.numel() * p.element_size() for p in model.parameters()),
        )

    return start


def measure_disk(folder: Path) -> dict[str, Any]:
    """Reads the weight files with several plain large reads in flight, into memory that is used again."""
    buffers = threading.local()

    def read(place: tuple[int, int]) -> int:
        if not hasattr(buffers, "memory"):
            buffers.memory = bytearray(READ_BYTES)
        return os.preadv(place[0], [buffers.memory], place[1])

    descriptors = [os.open(path, os.O_RDONLY) for path in sorted(folder.glob("*.safetensors"))]
    places = [(fd, at) for fd in descriptors for at in range(0, os.fstat(fd).st_size, READ_BYTES)]
    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as readers:
        num_bytes = sum(readers.map(read, places))
    seconds = time.perf_counter() - started
    for descriptor in descriptors:
        os.close(descriptor)
    return {"bytes_per_second": num_bytes / seconds}


def prepare_cache(folder: Path, temperature: Temperature) -> float:
    """Touches memory, then brings the files into the page cache or drops them; returns the share that is there."""
    touch_memory(folder)
    if temperature == "warm":
        measure_disk(folder)
    else:
        drop_from_cache(folder)
    return measure_cached_share(folder)


def measure_cached_share(folder: Path) -> float:
    """Returns which share of the weight files' pages is in the page cache, 0 to 1; reads none of them."""
    import numpy as np

    libc = ctypes.CDLL(None, use_errno=True)
    num_pages = num_cached = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            is_cached = np.zeros(-(-len(mapping) // mmap.PAGESIZE), dtype=np.uint8)
            view = np.frombuffer(mapping, dtype=np.uint8)
            status = libc.mincore(
                ctypes.c_void_p(view.ctypes.data),
                ctypes.c_size_t(len(mapping)),
                ctypes.c_void_p(is_cached.ctypes.data),
            )
            del view
            if status:
                raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
        num_pages += len(is_cached)
        num_cached += int((is_cached & 1).sum())
    return num_cached / num_pages


def touch_memory(folder: Path) -> None:
    """Writes and frees memory for the weights and their pages in the cache, as far as that much is free.

    In huge pages, since it is whole blocks of them that a virtual machine hands back.
    """
    free_line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemFree" in line)
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    num_bytes = min(2 * weight_bytes, int(free_line.split()[1]) * 1024 * 9 // 10)
    with mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        zeros = bytes(TOUCHED_BYTES)
        while memory.tell() < num_bytes:
            memory.write(zeros[: num_bytes - memory.tell()])


def drop_from_cache(folder: Path) -> None:
    """Makes the next reader of the folder's files read the disk."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def start_worker(system: str, folder: Path, plan: Plan, temperature: Temperature) -> Outcome:
    arguments = ["--worker", system, "--folder", str(folder), "--threads", str(plan.threads)]
    arguments += ["--temperature", temperature]
    return harness.run_worker(Path(__file__), arguments, plan.threads, plan.limit_seconds)


def measure_loads(temperature: Temperature, folder: Path, plan: Plan) -> Loads:
    loads = Loads(temperature=temperature)
    systems = plan.systems if temperature == "warm" else (*plan.systems, DISK)
    passes = harness.alternating_passes(systems, plan.rounds)
    for number, order in enumerate(passes, start=1):
        for system in order:
            if loads.is_out(system):
                continue
            print(f"{temperature}: pass {number} of {len(passes)}, {system}", file=sys.stderr, flush=True)
            loads.add(system, start_worker(system, folder, plan, temperature))
    return loads


def find_disagreement(measured: Sequence[Loads]) -> str | None:
    """Returns which system found which likeliest tokens where they are not all the same one, else None."""
    favourites: dict[str, set[int]] = {}
    for loads in measured:
        for system, records in loads.records.items():
            if system != DISK:
                favourites.setdefault(system, set()).update(record["favourite"] for record in records)
    if len(set().union(*favourites.values())) <= 1:
        return None
    found = ", ".join(f"{system} {sorted(tokens)}" for system, tokens in favourites.items())
    return f"the loads are not of one model: the likeliest token after the prompt is, by system, {found}"


def make_claims(warm: Loads, cold: Loads) -> list[Claim]:
    """Speed against the faster transformers in both temperatures, memory, and the share of the disk's rate."""
    return [
        _claim_speed(warm, WARM_FLOOR),
        _claim_speed(cold, COLD_FLOOR),
        _claim_memory([warm, cold]),
        _claim_disk_share(cold),
    ]


def _claim_speed(loads: Loads, floor: float) -> Claim:
    name = f"load/{loads.temperature}/speed_over_transformers"
    rivals = [system for system in TRANSFORMERS if system in loads.records]
    if OURS not in loads.records or not rivals:
        return Claim(name, floor, missing=OURS if OURS not in loads.records else TRANSFORMERS[0])
    what = "first_logits_seconds"
    fastest = min(rivals, key=lambda system: loads.spread(system, what).median)
    return Claim(name, floor, harness.pair_ratios(loads.collect(fastest, what), loads.collect(OURS, what)))


def _claim_memory(measured: Sequence[Loads]) -> Claim:
    """Peak over what is allowed: the weights, 2 % and 256 MiB."""
    records = [record for loads in measured for record in loads.records.get(OURS, [])]
    ratios = tuple(
        record["peak_bytes"] / (MEMORY_FACTOR * record["weight_bytes"] + MEMORY_EXTRA_BYTES)
        for record in records
    )
    return Claim("load/memory", 1.0, ratios, better="lower", missing=None if records else OURS)


def _claim_disk_share(cold: Loads) -> Claim:
    name = "load/cold/share_of_disk"
    missing = next((system for system in (OURS, DISK) if system not in cold.records), None)
    if missing is not None:
        return Claim(name, DISK_FLOOR, missing=missing)
    rates = [record["weight_bytes"] / record["load_seconds"] for record in cold.records[OURS]]
    return Claim(
        name, DISK_FLOOR, harness.pair_ratios(rates, cold.collect(DISK, "bytes_per_second")), goal=0.95
    )


def format_loads(loads: Loads) -> str:
    rows = []
    for system in sorted(
        set(loads.records) - {DISK}, key=lambda name: loads.spread(name, "load_seconds").median
    ):
        first, load = (loads.spread(system, what) for what in ("first_logits_seconds", "load_seconds"))
        record = loads.records[system][-1]
        peak = statistics.median(loads.collect(system, "peak_bytes"))
        rows.append(
            (
                system,
                f"{first.median:.2f}",
                f"{first.low:.2f}-{first.high:.2f}",
                f"{load.median:.2f}",
                f"{record['weight_bytes'] / load.median / 1e9:.2f}",
                f"{peak / 2**20:.0f}",
                f"{peak / record['weight_bytes']:.2f}",
            )
        )
    header = ("system", "s to logits", "10-90 %", "s to load", "GB/s", "peak MiB", "peak / weights")
    lines = [loads.temperature, harness.format_table(header, rows), *loads.absence_lines]
    if loads.odd_cache_line is not None:
        lines.append(loads.odd_cache_line)
    if DISK in loads.records:
        rate = loads.spread(DISK, "bytes_per_second")
        lines.append(
            f"disk, plain reads: {rate.median / 1e9:.2f} GB/s ({rate.low / 1e9:.2f}-{rate.high / 1e9:.2f})"
        )
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller checkpoint and fewer passes")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS)
    parser.add_argument("--rounds", type=int, help="each measures every system twice, forwards and backwards")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are kept; default: the cache of moesys"
    )
    parser.add_argument("--remove", action="store_true", help="delete the checkpoint afterwards")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw seconds to first logits; needs matplotlib"
    )
    parser.add_argument("--worker", choices=[*SYSTEMS, DISK], help=argparse.SUPPRESS)
    parser.add_argument("--temperature", choices=TEMPERATURES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> Plan:
    """The full or quick plan with what the user set."""
    names = ("shape", "systems", "rounds", "threads")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "systems" in chosen:
        chosen["systems"] = tuple(chosen["systems"])
    return replace(QUICK if options.quick else FULL, **chosen)


def find_folder(options: argparse.Namespace, plan: Plan) -> Path:
    """Returns the checkpoint's folder, and writes it where it is not there yet."""
    from moesys.env import read_cache_dir

    folder = (options.folder or read_cache_dir() / "benchmarks") / f"load-{plan.shape}"
    if not folder.exists():
        print(f"writing {2 * SHAPES[plan.shape].num_parameters / 2**30:.1f} GiB to {folder}", file=sys.stderr)
        make_checkpoint(folder, SHAPES[plan.shape])
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a claim is short, a system broke or two loaded different models."""
    options = parse_arguments(arguments)
    plan = make_plan(options)
    if options.worker is not None:
        print(json.dumps(measure_worker(options.worker, options.folder, plan.threads, options.temperature)))
        return 0
    machine = harness.describe_machine()
    folder = find_folder(options, plan)
    try:
        warm, cold = (measure_loads(temperature, folder, plan) for temperature in TEMPERATURES)
    finally:
        if options.remove:
            shutil.rmtree(folder)
    claims = make_claims(warm, cold)
    shape = SHAPES[plan.shape]
    print(f"{plan.shape}: {shape.num_layers} layers, {2 * shape.num_parameters / 2**30:.1f} GiB in bf16\n")
    for loads in (warm, cold):
        print(format_loads(loads), end="\n\n")
    print(
        f"{plan.threads} threads, {2 * plan.rounds} passes; load average before the run "
        f"{machine['load_average']:.1f} on {machine['cores']} cores"
    )
    for claim in claims:
        print(claim.line)
    disagreement = find_disagreement([warm, cold])
    if disagreement is not None:
        print(disagreement)
    if options.json is not None:
        contents = {
            "benchmark": "load",
            "settings": asdict(plan),
            "shape": asdict(shape),
            "warm": asdict(warm),
            "cold": asdict(cold),
            "odd_cache": [loads.odd_cache_line for loads in (warm, cold) if loads.odd_cache_line is not None],
            "disagreement": disagreement,
            "claims": [claim.record for claim in claims],
        }
        harness.write_record(options.json, ROOT, machine, PACKAGES, contents)
    if options.plot is not None:
        panels = {
            loads.temperature: {
                name: loads.spread(name, "first_logits_seconds") for name in loads.records if name != DISK
            }
            for loads in (warm, cold)
        }
        harness.plot_bars(options.plot, "seconds to first logits", panels)
    is_broken = bool(warm.failed or cold.failed or disagreement is not None)
    return int(is_broken or any(claim.verdict == "short" for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
