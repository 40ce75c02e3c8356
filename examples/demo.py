"""The demo: train a small sparse model on the text of the standard library, see it learn, export it, let it write.

    make demo                       about three minutes
    make demo DEMO_MINUTES=20       a longer look

Uses the same public functions as the command line; nothing here is special to the demo but the comparison with
the compressors and the report.
"""

from __future__ import annotations

import argparse
import bz2
import lzma
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from moesys.checkpoint import load_text_model, read_text_tools
from moesys.config import Config, TrainingConfig, dump_toml, load_config, parse_overrides
from moesys.data import load_documents, split_heldout
from moesys.inference import (
    Engine,
    OffloadRequest,
    SamplingParams,
    generate,
    load_offloaded,
    verify_model,
)
from moesys.training import (
    Evaluation,
    PlainConsole,
    ReportSummary,
    Trainer,
    exit_status,
    export_run,
    open_console,
    require_matplotlib,
    write_report,
)
from moesys.units import format_count

HERE = Path(__file__).resolve().parent
PROMPTS = ("def read_file(path):", "class Test", "The following example shows how to")
JUDGED_TOKENS = 670_000
FLOOR_BITS_PER_BYTE = 2.2
PROBE_STEPS = 12
UNTRAINED_TOKENS = 16_384
HALF = "50%"


@dataclass(frozen=True)
class Compressed:
    """What a compressor makes of the held-out files, in bits per byte."""

    name: str
    file_by_file: float
    concatenated: float


def main() -> int:
    """Returns 1 when a run that is long enough to be judged misses the floor."""
    options = parse_arguments()
    require_matplotlib()
    run: Path = options.run
    if run.exists():
        kept = run.with_name(f"{run.name}-{datetime.fromtimestamp(run.stat().st_mtime):%Y%m%d-%H%M%S}")
        print(f"the run of last time in {run} is now {kept}")
        run.rename(kept)
    config = load_config(HERE / "demo.toml", options.overrides)
    compressed = compress_heldout(config)
    config, tokens_per_s = fit_steps(config, options.minutes * 60)
    print(
        f"{tokens_per_s:.0f} tokens/s here, so {config.training.steps} steps fit {options.minutes:g} minutes"
    )

    with open_console(config.training.steps, sys.stdout) as console:
        trainer = Trainer.start(config, run, console)
        for line in trainer.describe():
            console.message(line)
        untrained = trainer.evaluate(UNTRAINED_TOKENS)
        console.message(f"untrained: {untrained.bits_per_byte:.3f} bits/byte; now training")
        outcome = trainer.train()
    if outcome.interrupted_by is not None:
        print(f"interrupted; go on with: .venv/bin/moesys resume {run}")
        return exit_status(outcome.interrupted_by)
    assert outcome.evaluation is not None

    export = run / "export"
    exported = export_run(run, export, None, on_damage=print)
    print(f"exported to {export} in {exported.family} layout: {exported.describe()}")
    samples = write_samples(export)
    is_equal = run_within_half(export)
    report = run / "report.html"
    write_report(run, summarise(trainer, outcome.evaluation, untrained, compressed, samples), report)
    status = print_outcome(trainer, outcome.evaluation, untrained, compressed, report)
    return status if is_equal else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train, export and run a small Mixture-of-Experts model.")
    parser.add_argument("--minutes", type=float, default=3.0, help="time for training (default: 3)")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as model.num_experts=32")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes ({options.minutes}) must be more than 0")
    if any(key == "training.steps" for key, _ in parse_overrides(options.overrides)):
        parser.error("training.steps has no effect here: the demo takes the steps that fit --minutes")
    return options


def fit_steps(config: Config, seconds: float) -> tuple[Config, float]:
    """Times a few steps of a throw-away run and returns the config with the steps that fit, and tokens/s."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Trainer.start(config, Path(folder) / "probe", PlainConsole(config.training.steps, sys.stderr))
        probe.take_step()
        started = time.perf_counter()
        for _ in range(PROBE_STEPS):
            probe.take_step()
        step_s = (time.perf_counter() - started) / PROBE_STEPS
    steps = max(count_fewest_steps(config.training), int(seconds / step_s))
    training = probe.config.training.model_copy(update={"steps": steps})
    return probe.config.model_copy(update={"training": training}), probe.tokens_per_step / step_s


def count_fewest_steps(training: TrainingConfig) -> int:
    """Returns the steps of the shortest run in which the decay comes after the warm-up."""
    undecayed = 1 - training.decay_fraction if training.schedule == "wsd" else 1.0
    return math.ceil((training.warmup_steps + 1) / undecayed) if undecayed > 0 else 1


def compress_heldout(config: Config) -> list[Compressed]:
    """Compresses the held-out files, each alone as the model sees them, and all in one."""
    documents = load_documents(config.data.source, config.data.format, config.data.text_field)
    _, heldout = split_heldout(documents, config.data.heldout_fraction)
    texts = [document.text.encode() for document in heldout]
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "xz -9": lambda text: lzma.compress(text, preset=9),
        "bz2": lambda text: bz2.compress(text, 9),
    }
    num_bytes = sum(map(len, texts))
    return [
        Compressed(
            name,
            file_by_file=8 * sum(len(compress(text)) for text in texts) / num_bytes,
            concatenated=8 * len(compress(b"".join(texts))) / num_bytes,
        )
        for name, compress in compressors.items()
    ]


def write_samples(export: Path) -> list[tuple[str, str]]:
    """Loads the exported folder and lets it continue three prompts."""
    loaded = load_text_model(export)
    engine = Engine(loaded.decoder)
    samples = []
    for prompt in PROMPTS:
        sampling = SamplingParams(temperature=0.7, top_p=0.95)
        generation = generate(engine, loaded.tokenizer, prompt, max_new_tokens=96, sampling=sampling)
        text = "".join(generation)
        assert generation.stats is not None
        print(f"\n--- {prompt}{text}\n--- {generation.stats.describe()}")
        samples.append((prompt, text))
    return samples


def run_within_half(export: Path) -> bool:
    """Runs the model with its experts on the disk and memory for half of its weights; returns whether it computed the
    same bits as with all of them."""
    request = OffloadRequest(HALF, num_positions=128, batch_size=1)
    with load_offloaded(export, request) as offloaded:
        print(f"\nthe same model within {HALF} of its size:\n{offloaded.describe_plan()}")
        tokenizer = read_text_tools(export).tokenizer
        engine = Engine(offloaded.model, offloaded.execution, num_pages=offloaded.num_pages)
        sampling = SamplingParams(temperature=0.7, top_p=0.95)
        generation = generate(engine, tokenizer, PROMPTS[0], max_new_tokens=48, sampling=sampling)
        print(f"--- {PROMPTS[0]}{''.join(generation)}\n--- {offloaded.describe_traffic()}")
    check = verify_model(export, HALF)
    for comparison in check.comparisons:
        print(comparison.describe())
    return check.is_equal


def summarise(
    trainer: Trainer,
    trained: Evaluation,
    untrained: Evaluation,
    compressed: list[Compressed],
    samples: list[tuple[str, str]],
) -> ReportSummary:
    environment = trainer.run.read_environment()
    return ReportSummary(
        title="moesys demo",
        facts=[
            ("Date", environment["date"]),
            ("Data", trainer.data.description),
            ("Parameters", f"{format_count(trainer.model.count_parameters())}, of which "
             f"{format_count(trainer.model.config.num_matmul_parameters_per_token)} multiply each token"),
            ("Trained on", f"{trainer.step} steps, {format_count(trainer.position.tokens)} tokens, "
             f"{trainer.config.training.dtype}"),
            ("Hardware", f"{environment['cpu']}, {environment['threads']} threads"),
            ("Versions", f"moesys {environment['moesys']} ({environment['git_revision']}), "
             f"torch {environment['packages']['torch']}, Python {environment['python']}"),
            ("Export", str(trainer.run.path / "export")),
        ],
        comparisons=[
            ("this model", trained.bits_per_byte),
            ("untrained model", untrained.bits_per_byte),
            *((f"{c.name}, file by file", c.file_by_file) for c in compressed),
            *((f"{c.name}, all files in one", c.concatenated) for c in compressed),
        ],
        reference_lines=[
            *((f"{c.name} file by file", c.file_by_file) for c in compressed),
            (f"{compressed[0].name} concatenated", compressed[0].concatenated),
        ],
        samples=samples,
        config_toml=dump_toml(trainer.config),
    )  # fmt: skip


def print_outcome(
    trainer: Trainer, trained: Evaluation, untrained: Evaluation, compressed: list[Compressed], report: Path
) -> int:
    tokens = trainer.position.tokens
    print(f"\nheld-out text, bits per byte (each file alone; {format_count(tokens)} training tokens):")
    print(f"  {'this model':24s} {trained.bits_per_byte:.3f}")
    print(f"  {'untrained':24s} {untrained.bits_per_byte:.3f}")
    for c in compressed:
        print(f"  {c.name:24s} {c.file_by_file:.3f}   (all files in one: {c.concatenated:.3f})")
    verdict = judge(trained.bits_per_byte, tokens, compressed[0].file_by_file)
    print(f"\nreport:  {report}\nexport:  {trainer.run.path / 'export'}")
    print(f"next:    .venv/bin/moesys chat {trainer.run.path / 'export'}")
    return int(verdict == "short")


def judge(bits_per_byte: float, tokens: int, goal: float) -> str:
    """Prints the claim; runs too short for the floor are shown and not judged."""
    verdict = (
        "skipped" if tokens < JUDGED_TOKENS else "ok" if bits_per_byte <= FLOOR_BITS_PER_BYTE else "short"
    )
    reason = f" fewer than {JUDGED_TOKENS} training tokens" if verdict == "skipped" else ""
    value = f"value={bits_per_byte:.3f} floor={FLOOR_BITS_PER_BYTE} goal={goal:.3f}"
    print(f"claim demo_bits_per_byte {value} {verdict}{reason}")
    return verdict


if __name__ == "__main__":
    sys.exit(main())
