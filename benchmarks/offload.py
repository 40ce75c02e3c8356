"""Decoding and prompts of a model in memory, and of one that does not fit: how close to the machine, beside the peers.

Three parts. ``ram``: everything in memory, one token and eight at a time, and a prompt. ``capped``: experts come from
the disk, under a limit on memory that a control group enforces. ``ring``: a long prompt under that limit. The model has
the shape of OLMoE's layers and random weights; it is written once and kept. Every measurement is a process of its own
(this script with ``--worker``), alternating A B B A, and starts with the files dropped from the page cache.

Random tokens make routing as diverse as it can be, greedy decoding of random weights as narrow; ``replay`` gives tokens
the experts that a trained model chose on real text (`record_routing.py`). All are reported.

Shares are of ceilings that our own process measures before and after: the rate of reading memory, and the best of
buffered and direct reads of the same files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import harness
from decode_peers import ACCELERATE, LLAMA, OURS, RESIDENT, TRANSFORMERS
from decode_peers.claims import find_disagreements, make_claims
from decode_peers.report import compute_speed_spreads, format_case
from decode_peers.workload import Case, Feed, Format, ModelFiles, Phase, Task
from harness import Measured, Outcome
from make_checkpoint import SHAPES, make_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("moesys", "torch", "transformers", "accelerate", "llama-cpp-python", "gguf")
PARTS = ("ram", "capped", "ring")
EMBEDDING_STD = 1.0
"""As torch draws embeddings: a token's own vector then decides where it is routed."""
ROUTING = ROOT / "benchmarks" / "results" / "routing-64x8.safetensors"
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What one invocation measures."""

    shape: str
    cap_bytes: int
    int8_cap_bytes: int
    steps: int
    ring_tokens: int
    parts: tuple[str, ...] = PARTS
    rounds: int = 1
    threads: int = 2
    seed: int = 0
    limit_seconds: float = 300.0

    def make_cases(self) -> list[Case]:
        """In the order of measuring."""
        cases = {"ram": self._make_ram, "capped": self._make_capped, "ring": self._make_ring}
        return [case for part in self.parts for case in cases[part]()]

    def _make_ram(self) -> list[Case]:
        single, greedy = Phase(Feed.RANDOM, 1, 16, self.steps), Phase(Feed.GREEDY, 1, 16, self.steps // 2)
        eight = Phase(Feed.RANDOM, 8, 16, self.steps // 2)
        prompt = Phase(Feed.RANDOM, 1, 512, 0)
        return [
            Case("ram/bf16", Format.BF16, (prompt, single, greedy, eight), (OURS, LLAMA, TRANSFORMERS)),
            Case("ram/int8", Format.INT8, (single, eight), (OURS, LLAMA)),
        ]

    def _make_capped(self) -> list[Case]:
        single, greedy = Phase(Feed.RANDOM, 1, 16, self.steps), Phase(Feed.GREEDY, 1, 16, self.steps // 2)
        replayed = replace(single, feed=Feed.REPLAY)
        eight = Phase(Feed.RANDOM, 8, 16, self.steps // 4)
        eight_replayed = Phase(Feed.REPLAY, 8, 16, self.steps // 2)
        few = Phase(Feed.RANDOM, 1, 16, 4)
        return [
            Case("capped/bf16", Format.BF16, (single, greedy, replayed), (OURS, LLAMA), self.cap_bytes),
            Case("capped/bf16/x8", Format.BF16, (eight, eight_replayed), (OURS, LLAMA), self.cap_bytes),
            Case("capped/bf16/few", Format.BF16, (few,), (ACCELERATE,), self.cap_bytes),
            Case("capped/int8", Format.INT8, (single, replayed), (OURS, LLAMA), self.int8_cap_bytes),
        ]

    def _make_ring(self) -> list[Case]:
        prompt = Phase(Feed.RANDOM, 1, self.ring_tokens, 0)
        return [Case("ring/bf16", Format.BF16, (prompt,), (OURS, RESIDENT), self.cap_bytes)]


FULL = Plan("olmoe-8", int(3.5 * GIB), 2 * GIB, 48, 2048)
QUICK = Plan("olmoe-2", int(1.2 * GIB), int(0.8 * GIB), 16, 512)


class Runner:
    """Starts this script again for each measurement, with the arguments that it was itself started with."""

    def __init__(self, plan: Plan, arguments: Sequence[str]) -> None:
        self._plan, self._arguments = plan, arguments

    def measure_case(self, number: int, case: Case) -> Measured:
        measured = Measured()
        passes = harness.alternating_passes(case.systems, self._plan.rounds)
        for at, systems in enumerate(passes, start=1):
            for system in systems:
                if measured.is_out(system):
                    continue
                print(f"{case.name}: pass {at} of {len(passes)}, {system}", file=sys.stderr, flush=True)
                arguments = [*self._arguments, "--worker", system, str(number)]
                outcome = harness.run_worker(
                    Path(__file__), arguments, self._plan.threads, self._plan.limit_seconds
                )
                measured.add(system, explain_end(system, case, outcome))
        return measured


def explain_end(system: str, case: Case, outcome: Outcome) -> Outcome:
    """Takes a peer that the system ended under a cap for one that cannot run within it."""
    was_ended = outcome.failed is not None and outcome.failed.startswith(f"exit code -{int(signal.SIGKILL)}:")
    if was_ended and case.cap_bytes is not None and system != OURS:
        return Outcome(skipped=f"it needs more than {case.cap_bytes / GIB:.2f} GiB")
    return outcome


def run_worker(system: str, case: Case, files: ModelFiles, plan: Plan) -> dict[str, Any]:
    """In a fresh process: measures one system on one case."""
    import torch

    from decode_peers import worker

    torch.set_num_threads(plan.threads)
    return worker.measure(
        system, Task(files, case.form, case.phases, case.cap_bytes, plan.threads, plan.seed)
    )


def prepare_files(files: ModelFiles, plan: Plan) -> None:
    """Writes the weights in every layout that is not there yet and whose writer is installed."""
    if not files.folder.exists():
        print(f"writing {files.folder}", file=sys.stderr, flush=True)
        make_checkpoint(files.folder, files.shape, embedding_std=EMBEDDING_STD)
    for form in {case.form: None for case in plan.make_cases()}:
        if form is Format.INT8 and not files.packed(form).exists():
            pack(files, form)
        if not files.gguf(form).exists() and importlib.util.find_spec("gguf") is not None:
            from decode_peers.gguf_file import write_gguf

            print(f"writing {files.gguf(form)}", file=sys.stderr, flush=True)
            write_gguf(files.folder, files.shape, form, files.gguf(form))


def pack(files: ModelFiles, form: Format) -> None:
    """Writes what ``moesys pack`` writes."""
    from moesys.checkpoint.packed_form import PackedForm
    from moesys.checkpoint.packing import pack_model

    path = files.packed(form)
    print(f"writing {path}", file=sys.stderr, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    pack_model(files.folder, path, form=PackedForm(form))


def measure_machine(files: ModelFiles) -> None:
    """Has this machine measured where it was not, as a plan for a model that does not fit needs to be good."""
    from moesys.inference.offload_plan import find_saved_profile

    if find_saved_profile(files.folder) is None:
        print("moesys doctor", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "moesys", "doctor", "--folder", str(files.folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def find_files(options: argparse.Namespace, plan: Plan) -> ModelFiles:
    from moesys.env import read_cache_dir

    folder = (options.folder or read_cache_dir() / "benchmarks") / f"offload-{plan.shape}"
    routing = options.routing if options.routing.exists() else None
    return ModelFiles(folder.absolute(), SHAPES[plan.shape], routing)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two layers under 1.2 GiB")
    parser.add_argument("--parts", "--part", nargs="+", choices=PARTS)
    parser.add_argument("--rounds", type=int, help="each measures every system twice, forwards and backwards")
    parser.add_argument("--steps", type=int, help="timed steps of the longest phases")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--folder", type=Path, help="where models are kept; default: the cache of moesys")
    parser.add_argument("--routing", type=Path, default=ROUTING, help="recorded routing to replay")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens/s; needs matplotlib")
    parser.add_argument("--worker", nargs=2, metavar=("SYSTEM", "CASE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> Plan:
    """The full or quick plan with what the user set."""
    names = ("parts", "rounds", "steps", "threads", "seed")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "parts" in chosen:
        chosen["parts"] = tuple(chosen["parts"])
    return replace(QUICK if options.quick else FULL, **chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when a claim is short, a system broke or two decoded different models."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(given)
    plan = make_plan(options)
    files = find_files(options, plan)
    cases = plan.make_cases()
    if options.worker is not None:
        system, number = options.worker
        print(json.dumps(run_worker(system, cases[int(number)], files, plan)))
        return 0
    machine = harness.describe_machine()
    prepare_files(files, plan)
    measure_machine(files)
    runner = Runner(plan, given)
    results = []
    for number, case in enumerate(cases):
        results.append((case, runner.measure_case(number, case)))
        print(format_case(*results[-1], files.shape), end="\n\n", flush=True)
    print(
        f"{plan.shape}, {plan.threads} threads, {2 * plan.rounds} passes; load average before the run "
        f"{machine['load_average']:.1f} on {machine['cores']} cores"
    )
    if files.routing is None:
        print(f"skipped replay ({options.routing} is not there; record_routing.py makes it)")
    claims = [claim for case, measured in results for claim in make_claims(case, measured, files.shape)]
    for claim in claims:
        print(claim.line)
    disagreements = [line for case, measured in results for line in find_disagreements(case, measured)]
    for line in disagreements:
        print(line)
    if options.json is not None:
        contents = {
            "benchmark": "offload",
            "settings": asdict(plan),
            "shape": asdict(files.shape),
            "cases": [{"case": asdict(case), "measured": asdict(measured)} for case, measured in results],
            "disagreements": disagreements,
            "claims": [claim.record for claim in claims],
        }
        harness.write_record(options.json, ROOT, machine, PACKAGES, contents)
    if options.plot is not None:
        harness.plot_bars(
            options.plot,
            "tokens/s",
            {case.name: compute_speed_spreads(case, measured) for case, measured in results},
        )
    is_broken = bool(disagreements) or any(measured.failed for _, measured in results)
    return int(is_broken or any(claim.verdict == "short" for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
