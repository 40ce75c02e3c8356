"""Tokens per second and peak memory of one training step on CPU, beside the same network in other libraries.

Every system is a process of its own (this script with ``--worker``), alternating A B B A, on the same tokens,
mask, losses, AdamW call and threads. fp32 carries the claims. ``--dtype bf16`` is reported without: there,
peers keep fp32 weights under ``torch.autocast`` (which does not reach every experts implementation) and
moesys keeps bf16 weights with fp32 masters. Speed is also given as a share of the measured GEMM rate: model
FLOPs per token (``peers.workload.Shape.flops_per_token``) x tokens/s / FLOP/s.

What moesys says of its routers is measured apart, in more passes, because it is to cost at most a hundredth: the same
step with and without it, alternating in the same way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import harness
import peers
from harness import Claim, Measured, Outcome, Spread
from peers.workload import Shape, draw_batches

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("moesys", "torch", "transformers", "deepspeed", "tutel")
OURS = "moesys"
UNMETERED = "moesys-unmetered"
TELEMETRY_FLOOR = 1.01
DENSE = "dense"
GEMM = "gemm"
TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

SIZES = {
    "demo": Shape(num_layers=4, hidden_size=256, num_heads=4, num_experts=16, top_k=2, expert_size=256),
    "8-experts": Shape(num_layers=4, hidden_size=256, num_heads=8, num_experts=8, top_k=2, expert_size=1024),
    "64-experts": Shape(num_layers=4, hidden_size=512, num_heads=8, num_experts=64, top_k=8, expert_size=256),
}


@dataclass(frozen=True)
class Rival:
    """Who a claim is against: the fastest of ``systems`` for speed, the leanest for memory."""

    name: str
    systems: tuple[str, ...]
    speed_floor: float
    memory_floor: float | None


@dataclass(frozen=True)
class Plan:
    """What one invocation measures."""

    sizes: tuple[str, ...]
    systems: tuple[str, ...]
    rivals: tuple[Rival, ...]
    rounds: int
    telemetry_rounds: int
    warmup_steps: int
    steps: int
    dtype: peers.Arithmetic = "fp32"
    threads: int = 2
    seed: int = 0
    slowest_step_seconds: float = 10.0


TRANSFORMERS = tuple(name for name in peers.SYSTEMS if name.startswith("transformers-"))
DEEPSPEED = ("deepspeed", "deepspeed-dropless")

FULL = Plan(
    sizes=tuple(SIZES),
    systems=tuple(name for name in peers.SYSTEMS if name != UNMETERED),
    rivals=(
        Rival("transformers", TRANSFORMERS, 1.10, 1.0),
        Rival("deepspeed", DEEPSPEED, 1.15, 1.0),
        Rival("tutel", ("tutel",), 1.0, None),
    ),
    rounds=1,
    telemetry_rounds=4,
    warmup_steps=2,
    steps=6,
)
QUICK = Plan(
    sizes=("demo", "64-experts"),
    systems=(OURS, "transformers-grouped_mm", "deepspeed", DENSE),
    rivals=(
        Rival("transformers-grouped_mm", ("transformers-grouped_mm",), 1.05, 1.05),
        Rival("deepspeed", ("deepspeed",), 1.10, 1.05),
    ),
    rounds=1,
    telemetry_rounds=2,
    warmup_steps=1,
    steps=4,
)


@dataclass
class SizeResult(Measured):
    """What was measured at one size: a record per pass and system, and who is absent and why."""

    size: str = field(kw_only=True)

    def step_seconds(self, system: str) -> list[float]:
        """Of every timed step, pass by pass; step i has the same batch in every system."""
        return [seconds for record in self.records[system] for seconds in record["step_seconds"]]

    def rates(self, system: str) -> list[float]:
        """Tokens per second of every timed step, in the order of `step_seconds`."""
        return [SIZES[self.size].num_tokens / seconds for seconds in self.step_seconds(system)]

    def rate_spread(self, system: str) -> Spread:
        return Spread.of(self.rates(system))

    def peaks(self, system: str) -> list[float]:
        """Peak bytes above an idle process, of each pass."""
        return [float(record["peak_bytes"]) for record in self.records[system]]


def measure_worker(system: str, plan: Plan, size: str) -> dict[str, Any]:
    """In a fresh process: weighs the idle process, builds the system, warms up, times steps."""
    import torch

    # Optimizers import it on their first step; a library that did so earlier would look leaner.
    import torch._dynamo

    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    if system == GEMM:
        return {"flops": measure_gemm(TORCH_DTYPES[plan.dtype])}
    build = peers.load_builder(system)
    memory = harness.PeakMemory()
    shape = SIZES[size]
    trainee = build(peers.SYSTEMS[system].variant, shape, plan.dtype)
    batches = draw_batches(shape, plan.warmup_steps + plan.steps, plan.seed)
    memory.reset()

    seconds, losses = [], []
    for batch in batches:
        started = time.perf_counter()
        losses.append(trainee.step(batch))
        seconds.append(time.perf_counter() - started)
        if len(seconds) > 1 and min(seconds) > plan.slowest_step_seconds:
            raise peers.UnavailableError(
                f"a step takes {min(seconds):.0f} s; the limit is {plan.slowest_step_seconds:.0f} s"
            )
    return {
        "step_seconds": seconds[plan.warmup_steps :],
        "losses": losses,
        "idle_bytes": memory.idle_bytes,
        "peak_bytes": memory.read_bytes(),
        "dropped_share": trainee.count_dropped(),
    }


def measure_gemm(dtype_name: str) -> float:
    """FLOP/s of the faster of torch's product and ours: the ceiling that the shares of all systems refer to."""
    import torch

    from moesys.planning import measure_gemm_rate

    ours = measure_gemm_rate(getattr(torch, dtype_name), torch.device("cpu"))
    return max(ours, harness.measure_gemm_flops(dtype_name))


def start_worker(system: str, plan: Plan, size: str) -> Outcome:
    options = {
        "--worker": system,
        "--sizes": size,
        "--dtype": plan.dtype,
        "--threads": plan.threads,
        "--warmup-steps": plan.warmup_steps,
        "--steps": plan.steps,
        "--seed": plan.seed,
    }
    arguments = [str(word) for option in options.items() for word in option]
    limit_seconds = 60 + plan.slowest_step_seconds * (plan.warmup_steps + plan.steps)
    return harness.run_worker(Path(__file__), arguments, plan.threads, limit_seconds)


def measure_size(size: str, plan: Plan) -> SizeResult:
    result = SizeResult(size=size)
    passes = harness.alternating_passes(plan.systems, plan.rounds)
    for number, systems in enumerate(passes, start=1):
        for system in systems:
            if result.is_out(system):
                continue
            print(f"{size}: pass {number} of {len(passes)}, {system}", file=sys.stderr, flush=True)
            result.add(system, start_worker(system, plan, size))
    return result


def measure_telemetry(size: str, plan: Plan) -> SizeResult:
    """Our step with and without telemetry, in passes of their own."""
    return measure_size(size, replace(plan, systems=(OURS, UNMETERED), rounds=plan.telemetry_rounds))


def measure_ceiling(plan: Plan) -> list[float]:
    """FLOP/s of a matrix product, in as many fresh processes as there are passes of one round."""
    outcomes = [start_worker(GEMM, plan, plan.sizes[0]) for _ in range(2)]
    broken = [outcome.failed for outcome in outcomes if outcome.record is None]
    if broken:
        raise RuntimeError(f"the GEMM rate could not be measured: {broken[0]}")
    return [outcome.record["flops"] for outcome in outcomes if outcome.record is not None]


def make_claims(result: SizeResult, plan: Plan) -> list[Claim]:
    """Speed and memory against each rival; the goal of speed is the dense network's, in the same unit."""
    return [claim for rival in plan.rivals for claim in _claims_against(rival, result)]


def make_telemetry_claim(result: SizeResult) -> Claim:
    """The time of a step with telemetry over that of the same step without."""
    name = f"train_step/{result.size}/telemetry"
    missing = next((system for system in (OURS, UNMETERED) if system not in result.records), None)
    if missing is not None:
        return Claim(name, TELEMETRY_FLOOR, missing=missing)
    ratios = harness.pair_ratios(result.step_seconds(OURS), result.step_seconds(UNMETERED))
    return Claim(name, TELEMETRY_FLOOR, ratios, goal=1.0, better="lower")


def _claims_against(rival: Rival, result: SizeResult) -> list[Claim]:
    names = {"speed": f"train_step/{result.size}/speed_over_{rival.name}"}
    floors = {"speed": rival.speed_floor}
    if rival.memory_floor is not None:
        names["memory"] = f"train_step/{result.size}/memory_over_{rival.name}"
        floors["memory"] = rival.memory_floor
    present = [system for system in rival.systems if system in result.records]
    missing = OURS if OURS not in result.records else rival.name if not present else None
    if missing is not None:
        return [Claim(names[kind], floors[kind], missing=missing) for kind in names]

    fastest = max(present, key=lambda system: result.rate_spread(system).median)
    their_rates = result.rates(fastest)
    goal = None
    if DENSE in result.records:
        goal = statistics.median(harness.pair_ratios(result.rates(DENSE), their_rates))
    claims = [
        Claim(names["speed"], floors["speed"], harness.pair_ratios(result.rates(OURS), their_rates), goal)
    ]
    if "memory" in names:
        leanest = min(present, key=lambda system: statistics.median(result.peaks(system)))
        ratios = harness.pair_ratios(result.peaks(OURS), result.peaks(leanest))
        claims.append(Claim(names["memory"], floors["memory"], ratios, better="lower"))
    return claims


def format_size(result: SizeResult, gemm_flops: float) -> str:
    shape = SIZES[result.size]
    title = (
        f"{result.size}: {shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_heads} heads, "
        f"{shape.num_experts} experts top-{shape.top_k} of {shape.expert_size}, "
        f"{shape.num_tokens} tokens per step, {shape.flops_per_token / 1e6:.1f} MFLOP per token"
    )
    dense = result.rate_spread(DENSE).median if DENSE in result.records else None
    rows = []
    for system in sorted(result.records, key=lambda name: -result.rate_spread(name).median):
        rate = result.rate_spread(system)
        dropped = result.records[system][-1]["dropped_share"]
        rows.append(
            (
                system,
                f"{rate.median:.0f}",
                f"{rate.low:.0f}-{rate.high:.0f}",
                f"{shape.num_tokens / rate.median * 1e3:.0f}",
                f"{rate.median * shape.flops_per_token / gemm_flops:.0%}",
                "-" if dense is None else f"{rate.median / dense:.2f}",
                f"{statistics.median(result.peaks(system)) / 2**20:.0f}",
                "-" if dropped is None else f"{dropped:.1%}",
            )
        )
    header = ("system", "tokens/s", "10-90 %", "ms/step", "of GEMM", "of dense", "peak MiB", "dropped")
    return "\n".join([title, harness.format_table(header, rows), *result.absence_lines])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, fewer systems and steps, own floors")
    parser.add_argument("--sizes", nargs="+", choices=SIZES)
    parser.add_argument("--systems", nargs="+", choices=peers.SYSTEMS)
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, help="each measures every system twice, forwards and backwards")
    parser.add_argument(
        "--telemetry-rounds", type=int, help="the same for the cost of telemetry; 0 leaves it out"
    )
    parser.add_argument("--steps", type=int, help="timed steps per process")
    parser.add_argument("--warmup-steps", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens/s; needs matplotlib")
    parser.add_argument("--worker", choices=[*peers.SYSTEMS, GEMM], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> Plan:
    """The full or quick plan with what the user set; peers' claims stay, and are skipped where unmeasured."""
    names = (
        "sizes",
        "systems",
        "rounds",
        "telemetry_rounds",
        "steps",
        "warmup_steps",
        "dtype",
        "threads",
        "seed",
    )
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name in ("sizes", "systems"):
        if name in chosen:
            chosen[name] = tuple(chosen[name])
    plan = replace(QUICK if options.quick else FULL, **chosen)
    return plan if plan.dtype == "fp32" else replace(plan, rivals=(), telemetry_rounds=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a claim is short or a system broke."""
    options = parse_arguments(arguments)
    plan = make_plan(options)
    if options.worker is not None:
        try:
            record = measure_worker(options.worker, plan, plan.sizes[0])
        except peers.UnavailableError as reason:
            record = {"skipped": str(reason)}
        print(json.dumps(record))
        return 0

    machine = harness.describe_machine()
    gemm_flops = measure_ceiling(plan)
    results = [measure_size(size, plan) for size in plan.sizes]
    gemm_flops += measure_ceiling(plan)
    measures_telemetry = plan.telemetry_rounds > 0 and OURS in plan.systems
    telemetry = [measure_telemetry(size, plan) for size in plan.sizes] if measures_telemetry else []
    claims = [claim for result in results for claim in make_claims(result, plan)]
    claims += [make_telemetry_claim(result) for result in telemetry]

    for result in results:
        print(format_size(result, max(gemm_flops)), end="\n\n")
    print(
        f"{plan.dtype}, {plan.threads} threads, {2 * plan.rounds} passes of {plan.steps} steps; "
        f"GEMM {max(gemm_flops) / 1e9:.0f} GFLOP/s ({min(gemm_flops) / 1e9:.0f} at worst); "
        f"load average before the run {machine['load_average']:.1f} on {machine['cores']} cores"
    )
    for claim in claims:
        print(claim.line)
    if options.json is not None:
        contents = {
            "benchmark": "train_step",
            "settings": asdict(plan),
            "shapes": {size: asdict(SIZES[size]) for size in plan.sizes},
            "gemm_flops": gemm_flops,
            "results": [
                asdict(result)
                | {"tokens_per_second": {name: asdict(result.rate_spread(name)) for name in result.records}}
                for result in results
            ],
            "telemetry": [asdict(result) for result in telemetry],
            "claims": [claim.record for claim in claims],
        }
        harness.write_record(options.json, ROOT, machine, PACKAGES, contents)
    if options.plot is not None:
        panels = {r.size: {name: r.rate_spread(name) for name in r.records} for r in results}
        harness.plot_bars(options.plot, "tokens per second", panels)
    broken = any(result.failed for result in results + telemetry)
    return int(broken or any(claim.verdict == "short" for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
