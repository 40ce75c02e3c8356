"""A step that was skipped for NaN or Inf leaves no trace in what a run says of its routers, but is itself told."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_runs import STEPS, start

from moesys.training import PlainConsole, Trainer
from moesys.training.metrics import TrainMetrics, read_metrics
from moesys.training.step import StepResult

TOKENS = 4 * 16 * 2
"""Assignments of a step in the tiny runs."""


@contextmanager
def poisoned_router(trainer: Trainer) -> Iterator[None]:
    """Puts a NaN into a router's weight for a while: logits, entropy and loss become NaN."""
    weight = dict(trainer.model.named_parameters())["blocks.0.feed_forward.router.weight_ED"]
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = math.nan
    yield
    with torch.no_grad():
        weight.copy_(before)


def spoil_steps(trainer: Trainer, *bad: int) -> None:
    """Makes the steps with these numbers NaN, the first being 1."""
    take_step = trainer.take_step

    def take() -> StepResult:
        if trainer.step + 1 not in bad:
            return take_step()
        with poisoned_router(trainer):
            return take_step()

    trainer.take_step = take


def read_lines(run: Path) -> list[TrainMetrics]:
    return read_metrics(run / "metrics.jsonl").train


@pytest.mark.parametrize("bad", [3, 4], ids=["first-of-its-line", "last-of-its-line"])
def test_routing_of_a_skipped_step_enters_no_line(corpus: Path, tmp_path: Path, bad: int) -> None:
    trainer = start(corpus, tmp_path / "run")
    trainer.console = PlainConsole(STEPS, output := io.StringIO())
    spoil_steps(trainer, bad)
    trainer.train()
    lines = read_lines(tmp_path / "run")
    assert [line.skipped_steps for line in lines] == [0, 1, 0, 0, 0]
    assert [sum(line.expert_tokens[0]) for line in lines] == [2 * TOKENS, TOKENS, *[2 * TOKENS] * 2, TOKENS]
    for line in lines:
        assert 0 < line.routing_entropy <= 1
        assert 0 < line.router_confidence <= 1
        assert 1 <= line.imbalance <= 4
    shown = [text for text in output.getvalue().splitlines() if "1 skipped" in text]
    assert [text.split(" |")[0] for text in shown] == [f"step 4/{STEPS}"]
    [event] = [
        e for e in read_metrics(tmp_path / "run" / "metrics.jsonl").events if e.event == "skipped_step"
    ]
    assert "its routing not counted" in event.message


def test_a_line_of_skipped_steps_alone_counts_nothing(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    spoil_steps(trainer, 3, 4)
    trainer.train()
    line = read_lines(tmp_path / "run")[1]
    assert (line.skipped_steps, line.moe_layers, line.expert_tokens) == (2, [0], [[0, 0, 0, 0]])
    means = (line.loss, line.routing_entropy, line.router_confidence, line.imbalance)
    assert all(map(math.isnan, means))
    assert line.tokens_per_s > 0


def test_the_values_are_those_of_the_applied_step(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    spoil_steps(trainer, 4)
    results = [trainer.take_step() for _ in range(4)]
    assert [result.is_finite for result in results] == [True, True, True, False]
    again = start(corpus, tmp_path / "again")
    spoil_steps(again, 4)
    again.train()
    line, load = read_lines(tmp_path / "again")[1], results[2].load
    assert line.expert_tokens == load.expert_tokens
    assert (line.routing_entropy, line.router_confidence) == (load.entropy, load.confidence)
    assert line.imbalance == pytest.approx(load.imbalance, rel=1e-12)
