"""Runs of a model so small that a step takes milliseconds."""

from __future__ import annotations

import io
from pathlib import Path

from moesys.config import load_config
from moesys.training import PlainConsole, Trainer

STEPS = 9
SETTINGS = [
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_experts=[4,0]",
    "model.intermediate_size=24",
    "model.expert_intermediate_size=12",
    "data.vocab_size=300",
    "data.sequence_length=16",
    "data.heldout_fraction=0.2",
    f"training.steps={STEPS}",
    "training.batch_sequences=4",
    "training.warmup_steps=2",
    "training.log_every=2",
]


def start(corpus: Path, run: Path, *more: str) -> Trainer:
    config = load_config(None, [*SETTINGS, f'data.source="{corpus}"', *more])
    return Trainer.start(config, run, PlainConsole(STEPS, io.StringIO()))


def resume(run: Path) -> Trainer:
    return Trainer.resume(run, PlainConsole(STEPS, io.StringIO()))
