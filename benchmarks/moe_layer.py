"""One MoE layer on CPU, forward only: few tokens at the speed of memory, many at the speed of arithmetic.

Three questions, one file each in ``layer_parts``: ``decode`` streams layers of OLMoE's shape, ``linear`` streams
dense matrices, both as a share of the measured memory-read rate; ``many`` compares whole layers with other
implementations on the same weights and tokens. Every system is a process of its own (this script with ``--worker``),
alternating A B B A, and is timed only after its result agreed with float64 on a few tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import harness
import layer_peers
from harness import Measured, Outcome, Timing
from layer_parts import Case, many_tokens, streams
from layer_parts.decode import Decode
from layer_parts.linear import TORCH, Linear
from layer_parts.many_tokens import Limits, ManyTokens
from layer_peers import OURS, SYSTEMS
from layer_peers.workload import Format, LayerShape

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("moesys", "torch", "transformers", "deepspeed", "tutel")
GEMM = "gemm"
GEMM_DTYPES = {Format.FP32: "float32", Format.BF16: "bfloat16"}
PARTS = ("decode", "linear", "many")
WORKER_LIMIT_SECONDS = 180.0

OLMOE = LayerShape(hidden_size=2048, inner_size=1024, num_experts=64, top_k=8)
SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape(256, 1024, 8, 2),
        LayerShape(1024, 1024, 8, 2),
        LayerShape(1024, 512, 64, 8),
        OLMOE,
    )
}


@dataclass(frozen=True)
class Floors:
    """What is claimed: shares of the read rate, and ratios of speed."""

    read_share: float = 0.75
    read_share_goal: float = 0.90
    cell: float = 0.95
    median: float = 1.0
    bf16_over_fp32: float = 0.85


@dataclass(frozen=True)
class Plan:
    """What one invocation measures."""

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    formats: tuple[Format, ...]
    systems: tuple[str, ...]
    decode_tokens: tuple[int, ...]
    decode_formats: tuple[Format, ...]
    decode_systems: tuple[str, ...]
    linear_sizes: tuple[tuple[int, int], ...]
    floors: Floors
    timing: Timing
    parts: tuple[str, ...] = PARTS
    rounds: int = 1
    kernel: str = SYSTEMS[OURS].variant
    threads: int = 2
    seed: int = 0

    def make_cases(self) -> list[Case]:
        """In the order of measuring; systems that do not take a format are left out of its cases."""
        cases: list[Case] = []
        if "decode" in self.parts:
            cases += [self._make_decode(form) for form in self.decode_formats]
        if "linear" in self.parts:
            cases += [self._make_linear(form) for form in self.decode_formats]
        if "many" in self.parts:
            cases += [self._make_many(SHAPES[name], form) for name in self.shapes for form in self.formats]
        return [case for case in cases if case.systems]

    def _make_decode(self, form: Format) -> Decode:
        systems = tuple(name for name in self.decode_systems if form in SYSTEMS[name].formats)
        floor, goal = self.floors.read_share, self.floors.read_share_goal
        return Decode(
            OLMOE, form, self.decode_tokens, systems, self.kernel, self.timing, floor, goal, self.seed
        )

    def _make_linear(self, form: Format) -> Linear:
        systems = (OURS,) if form.int8_product is not None else (OURS, TORCH)
        floor, goal = self.floors.read_share, self.floors.read_share_goal
        return Linear(self.linear_sizes, form, systems, self.kernel, self.timing, floor, goal, self.seed)

    def _make_many(self, shape: LayerShape, form: Format) -> ManyTokens:
        systems = tuple(name for name in self.systems if form in SYSTEMS[name].formats)
        limits = Limits(self.timing)
        return ManyTokens(shape, form, self.tokens, systems, self.kernel, limits, self.floors.cell, self.seed)


FULL = Plan(
    shapes=tuple(SHAPES),
    tokens=(64, 512, 4096),
    formats=(Format.FP32, Format.BF16),
    systems=tuple(SYSTEMS),
    decode_tokens=(1, 8, 32),
    decode_formats=tuple(Format),
    decode_systems=(OURS, "loop", "grouped_mm"),
    linear_sizes=((2048, 2048), (2048, 50304)),
    floors=Floors(),
    timing=Timing(),
)
QUICK = replace(
    FULL,
    shapes=(LayerShape(1024, 512, 64, 8).name,),
    tokens=(512,),
    systems=(OURS, "transformers-grouped_mm", "loop", "loop-widened"),
    decode_tokens=(1,),
    decode_formats=(Format.BF16, Format.W8),
    decode_systems=(OURS,),
    linear_sizes=((2048, 2048),),
    floors=Floors(read_share=0.70, cell=0.90, median=0.95, bf16_over_fp32=0.80),
)


def run_worker(system: str, case_name: str, plan: Plan) -> dict[str, Any]:
    """In a fresh process: measures one system on one case."""
    import torch

    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    if system == GEMM:
        return {"flops": harness.measure_gemm_flops(GEMM_DTYPES[Format(case_name)])}
    (case,) = (case for case in plan.make_cases() if case.name == case_name)
    try:
        return case.measure(system)
    except layer_peers.UnavailableError as reason:
        return {"skipped": str(reason)}


class Runner:
    """Starts this script again for each measurement, with the arguments that it was itself started with."""

    def __init__(self, plan: Plan, arguments: Sequence[str]) -> None:
        self._plan, self._arguments = plan, arguments

    def start(self, system: str, case_name: str) -> Outcome:
        arguments = [*self._arguments, "--worker", system, case_name]
        return harness.run_worker(Path(__file__), arguments, self._plan.threads, WORKER_LIMIT_SECONDS)

    def measure_case(self, case: Case) -> Measured:
        measured = Measured()
        passes = harness.alternating_passes(case.systems, self._plan.rounds)
        for number, systems in enumerate(passes, start=1):
            for system in systems:
                if measured.is_out(system) or not (number == 1 or case.deserves_pass(system, measured)):
                    continue
                print(f"{case.name}: pass {number} of {len(passes)}, {system}", file=sys.stderr, flush=True)
                measured.add(system, self.start(system, case.name))
        return measured

    def measure_gemm(self, form: Format) -> float:
        outcome = self.start(GEMM, form)
        if outcome.record is None:
            raise RuntimeError(f"the {form} GEMM rate could not be measured: {outcome.failed}")
        return outcome.record["flops"]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two cells, fewer systems, own floors")
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="layer shapes of 'many'")
    parser.add_argument("--tokens", nargs="+", type=int, help="numbers of tokens of 'many'")
    parser.add_argument("--formats", nargs="+", type=Format, choices=list(GEMM_DTYPES), help="of 'many'")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="systems of 'many'")
    parser.add_argument("--decode-formats", nargs="+", type=Format, choices=list(Format))
    parser.add_argument("--kernel", help=f"the kernel that '{OURS}' computes with: native, torch or auto")
    parser.add_argument("--rounds", type=int, help="each measures every system twice, forwards and backwards")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw shares of ceilings; needs matplotlib")
    parser.add_argument("--worker", nargs=2, metavar=("SYSTEM", "CASE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> Plan:
    """The full or quick plan with what the user set."""
    lists = ("parts", "shapes", "tokens", "formats", "systems", "decode_formats")
    numbers = ("kernel", "rounds", "threads", "seed")
    chosen = {name: getattr(options, name) for name in lists + numbers if getattr(options, name) is not None}
    for name in lists:
        if name in chosen:
            chosen[name] = tuple(chosen[name])
    if "tokens" in chosen:
        chosen["tokens"] = tuple(sorted(chosen["tokens"]))
    return replace(QUICK if options.quick else FULL, **chosen)


def make_claims(results: Sequence[tuple[Case, Measured]], plan: Plan) -> list[harness.Claim]:
    """Every case's own claims, then those over all cells."""
    claims = [claim for case, measured in results for claim in case.make_claims(measured)]
    many = [(case, measured) for case, measured in results if isinstance(case, ManyTokens)]
    for form in dict.fromkeys(case.form for case, _ in many):
        claims.append(many_tokens.claim_median_over_cells(many, form, plan.floors.median))
    return claims + many_tokens.claim_bf16_over_fp32(many, plan.floors.bf16_over_fp32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a claim is short or a system broke."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    plan = make_plan(options)
    if options.worker is not None:
        system, case_name = options.worker
        print(json.dumps(run_worker(system, case_name, plan)))
        return 0

    machine = harness.describe_machine()
    runner = Runner(plan, arguments)
    forms = plan.formats if "many" in plan.parts else ()
    gemm_flops = {form: [runner.measure_gemm(form)] for form in forms}
    results = [(case, runner.measure_case(case)) for case in plan.make_cases()]
    for form in forms:
        gemm_flops[form].append(runner.measure_gemm(form))

    best_gemm = {form: max(rates) for form, rates in gemm_flops.items()}
    claims = make_claims(results, plan)
    for case, measured in results:
        print(case.format(measured, best_gemm), end="\n\n")
    print(describe_run(results, plan, gemm_flops, machine))
    for claim in claims:
        print(claim.line)
    if options.json is not None:
        contents = {
            "benchmark": "moe_layer",
            "settings": asdict(plan),
            "gemm_flops": gemm_flops,
            "results": {case.name: asdict(measured) for case, measured in results},
            "claims": [claim.record for claim in claims],
        }
        harness.write_record(options.json, ROOT, machine, PACKAGES, contents)
    if options.plot is not None:
        panels = {case.name: case.compute_shares(measured, best_gemm) for case, measured in results}
        harness.plot_bars(options.plot, "share of the measured ceiling", panels)
    broken = any(measured.failed for _, measured in results)
    return int(broken or any(claim.verdict == "short" for claim in claims))


def describe_run(
    results: Sequence[tuple[Case, Measured]],
    plan: Plan,
    gemm_flops: dict[Format, list[float]],
    machine: dict[str, Any],
) -> str:
    """Settings, ceilings and how busy the machine was, on one line."""
    read_rates = [rate / 1e9 for _, measured in results for rate in streams.list_read_rates(measured)]
    words = [f"{plan.threads} threads, {2 * plan.rounds} passes, kernel {plan.kernel}"]
    if read_rates:
        words.append(f"memory read {max(read_rates):.1f} GB/s ({min(read_rates):.1f} at worst)")
    for form, rates in gemm_flops.items():
        words.append(f"{form} GEMM {max(rates) / 1e9:.0f} GFLOP/s ({min(rates) / 1e9:.0f} at worst)")
    words.append(f"load average before the run {machine['load_average']:.1f} on {machine['cores']} cores")
    return "; ".join(words)


if __name__ == "__main__":
    sys.exit(main())
