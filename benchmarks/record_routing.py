"""Trains a small model with many experts on real text and records where it sends text that it has not seen.

Random weights route at random, and a cache looks useless; one prompt repeated makes it look perfect. This gives the
benchmarks of offloading a routing that somebody's router has learned: 64 experts, top 8, 8 layers, balanced in the way
of OLMoE (arXiv 2409.02060: loss 0.01, z-loss 0.001), on the text of the standard library, which needs no download.

    python benchmarks/record_routing.py --minutes 30 --log benchmarks/results/routing-64x8.safetensors
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from moesys.config import Config, load_config
from moesys.data import PackedTokens
from moesys.models import Decoder, DocumentAttend
from moesys.moe import Execution, LocalDispatcher, make_resident_source
from moesys.moe.routing_log import RoutingLog, RoutingRecorder
from moesys.training import PlainConsole, Trainer, export_run
from moesys.units import format_bytes, format_count

SETTINGS = (
    "model.num_layers=8",
    "model.num_experts=64",
    "model.top_k=8",
    "model.hidden_size=128",
    "model.num_heads=4",
    "model.expert_intermediate_size=64",
    "model.normalize_top_k=false",
    "training.balance_loss=0.01",
    "training.router_z_loss=0.001",
    "training.learning_rate=1.5e-3",
    "training.schedule=wsd",
    "training.decay_fraction=0.4",
    "training.final_learning_rate_ratio=0.0",
)
PROBE_STEPS = 8
TOKENS = 6144


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, records, and writes the log."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    config = load_config(None, [*SETTINGS, f"runtime.threads={options.threads}", *options.overrides])
    config = fit_steps(config, options.minutes * 60)
    with tempfile.TemporaryDirectory() as folder:
        console = PlainConsole(config.training.steps, sys.stderr)
        trainer = Trainer.start(config, Path(folder) / "run", console)
        print("\n".join(trainer.describe()), flush=True)
        outcome = trainer.train()
        if outcome.evaluation is None:
            return 1
        origin = (
            f"{trainer.data.description}; trained on {format_count(trainer.position.tokens)} tokens, "
            f"{outcome.evaluation.bits_per_byte:.3f} held-out bits per byte"
        )
        print(origin)
        if options.model is not None:
            export_run(trainer.run.path, options.model, None, on_damage=print)
    log = record(trainer.model, trainer.data.heldout, options.tokens, config.data.sequence_length, origin)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    log.write(options.log)
    print(f"{log.num_tokens} tokens in {options.log}, {format_bytes(options.log.stat().st_size)}")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="time for training (default: 30)")
    parser.add_argument("--log", type=Path, required=True, help="the file to write")
    parser.add_argument("--model", type=Path, help="a folder to export the model to")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"to record (default: {TOKENS})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as model.num_experts=32")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.tokens < 1:
        parser.error(
            f"--minutes ({options.minutes}) must be more than 0 and --tokens ({options.tokens}) 1 or more"
        )
    return options


def fit_steps(config: Config, seconds: float) -> Config:
    """Times a few steps of a throw-away run and returns the config with the steps that fit."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Trainer.start(config, Path(folder) / "probe", PlainConsole(config.training.steps, sys.stderr))
        probe.take_step()
        started = time.perf_counter()
        for _ in range(PROBE_STEPS):
            probe.take_step()
        step_s = (time.perf_counter() - started) / PROBE_STEPS
    steps = max(2 * config.training.warmup_steps, int(seconds / step_s))
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


@torch.no_grad()
def record(model: Decoder, heldout: PackedTokens, num_tokens: int, window: int, origin: str) -> RoutingLog:
    """Returns the routing of the first ``num_tokens`` held-out tokens, one token per step as in decoding: with causal
    attention a token is routed the same whether those after it are there or not."""
    recorder = RoutingRecorder(make_resident_source(model))
    execution = Execution(LocalDispatcher(), recorder)
    model.eval()
    for token_ids in cut_documents(heldout, num_tokens, window):
        positions = torch.arange(token_ids.shape[0])
        model(token_ids[None], positions[None], DocumentAttend(None), execution)
    log = recorder.make_log(origin)
    return replace(log, step_offsets=torch.arange(log.num_tokens + 1))


def cut_documents(heldout: PackedTokens, num_tokens: int, window: int) -> Iterator[torch.Tensor]:
    """Yields tokens of one document after the other, at most ``window`` at a time, ``num_tokens`` in all."""
    starts = heldout.document_starts.tolist()
    left = num_tokens
    for start, end in pairwise(starts):
        for first in range(start, end, window):
            tokens = heldout.tokens[first : min(first + window, end, first + left)]
            if not len(tokens):
                return
            yield torch.from_numpy(tokens.astype("int64"))
            left -= len(tokens)


if __name__ == "__main__":
    sys.exit(main())
