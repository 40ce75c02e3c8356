"""Capacity in training: drops are counted and shown, and no way of carrying out a step changes what is dropped."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

import pytest
import torch
from tiny_runs import STEPS, resume, start

from moesys.training import PlainConsole, Trainer
from moesys.training.metrics import read_metrics

ASSIGNMENTS = 4 * 16 * 2
"""Of a step in the tiny runs, in one layer of four experts."""
TIGHT = "model.capacity_factor=0.75"
LIMIT = 24
"""ceil(64 tokens / 4 experts * 0.75 * 2 choices): at least a quarter of the assignments is dropped."""


def hash_state(trainer: Trainer) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in trainer.optimizer.export_state().items()
    }


def read_dropped(run: Path) -> list[int]:
    return [line.dropped for line in read_metrics(run / "metrics.jsonl").train]


def run_to_the_end(corpus: Path, run: Path, *more: str) -> dict[str, str]:
    trainer = start(corpus, run, *more)
    trainer.train()
    return hash_state(trainer)


def test_each_step_counts_what_exceeds_the_limit(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run", TIGHT)
    for _ in range(3):
        load = trainer.take_step().load
        (counts,) = load.expert_tokens
        assert sum(counts) == ASSIGNMENTS
        assert load.dropped == sum(max(0, count - LIMIT) for count in counts) >= ASSIGNMENTS // 4


@pytest.mark.parametrize("more", [(), ("memory.activation_checkpointing=true",)], ids=["kept", "recomputed"])
def test_drops_are_written_and_shown(corpus: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    trainer = start(corpus, tmp_path / "run", TIGHT, *more)
    trainer.console = PlainConsole(STEPS, output := io.StringIO())
    trainer.train()
    dropped = read_dropped(tmp_path / "run")
    assert all(
        count >= steps * ASSIGNMENTS // 4 for count, steps in zip(dropped, (2, 2, 2, 2, 1), strict=True)
    )
    shown = [float(share) for share in re.findall(r"\| ([\d.]+)% dropped \|?", output.getvalue())]
    expected = [100 * c / (s * ASSIGNMENTS) for c, s in zip(dropped, (2, 2, 2, 2, 1), strict=True)]
    assert shown == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize(
    "capacity",
    [
        (TIGHT,),
        (TIGHT, "model.drop_by=probability", "model.router_score=sigmoid"),
        ("model.capacity_factor=0.75", "model.capacity_formula=tutel", "model.drop_by=confidence"),
        ("model.capacity_factor=-0.75", "model.capacity_formula=tutel", "model.balance_bias_rate=0.01"),
    ],
    ids=["deepspeed", "probability", "confidence", "need-and-bias"],
)
def test_recomputed_accumulated_and_resumed_is_the_straight_run(
    corpus: Path, tmp_path: Path, capacity: tuple[str, ...], cut: int
) -> None:
    accumulated = (*capacity, "training.micro_batch_sequences=2")
    expected = run_to_the_end(corpus, tmp_path / "straight", *accumulated)
    first = start(corpus, tmp_path / "cut", *accumulated, "memory.activation_checkpointing=true")
    early = [first.take_step().load.dropped for _ in range(cut)]
    first.save()
    second = resume(tmp_path / "cut")
    second.train()
    assert hash_state(second) == expected
    assert sum(early) + sum(read_dropped(tmp_path / "cut")) == sum(read_dropped(tmp_path / "straight")) > 0


def test_the_limit_is_one_of_each_forward_pass(corpus: Path, tmp_path: Path) -> None:
    """Scope ``rank``: with smaller micro-batches other assignments are dropped, so the bits are others."""
    whole = run_to_the_end(corpus, tmp_path / "whole", TIGHT)
    assert run_to_the_end(corpus, tmp_path / "parts", TIGHT, "training.micro_batch_sequences=2") != whole


def test_a_negative_factor_drops_what_the_positive_one_does_and_zero_drops_nothing(
    corpus: Path, tmp_path: Path
) -> None:
    def run(name: str, *more: str) -> dict[str, str]:
        return run_to_the_end(corpus, tmp_path / name, *more)

    tutel = "model.capacity_formula=tutel"
    positive = run("positive", tutel, "model.capacity_factor=0.75")
    assert run("negative", tutel, "model.capacity_factor=-0.75") == positive
    dropless = run("dropless")
    assert run("zero", tutel, "model.capacity_factor=0") == dropless != positive
    assert sum(read_dropped(tmp_path / "zero")) == 0
