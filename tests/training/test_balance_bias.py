"""The balance bias of a run: saved with a checkpoint, resumed bit for bit; the scope of the balance loss arrives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import resume, start
from torch import Tensor

from moesys.training import Trainer
from moesys.training.metrics import read_metrics

BIASED = ("model.router_score=sigmoid", "model.balance_bias_rate=0.01")


def read_bias(trainer: Trainer) -> Tensor:
    return dict(trainer.model.named_buffers())["blocks.0.feed_forward.router.selection_bias_E"].clone()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bias_is_saved_and_resumed(corpus: Path, tmp_path: Path, dtype: str) -> None:
    trainer = start(corpus, tmp_path / "run", *BIASED, f"training.dtype={dtype}")
    for _ in range(4):
        trainer.take_step()
    trainer.save()
    bias = read_bias(trainer)
    assert bias.any()
    assert bias.dtype == torch.float32
    resumed = resume(tmp_path / "run")
    assert torch.equal(read_bias(resumed), bias)
    assert trainer.take_step() == resumed.take_step()
    assert torch.equal(read_bias(resumed), read_bias(trainer))


def test_the_scope_of_the_balance_loss_arrives(corpus: Path, tmp_path: Path) -> None:
    losses = []
    for scope in ("micro_batch", "sequence"):
        run = tmp_path / scope
        start(corpus, run, f"training.balance_scope={scope}").train()
        losses.append(read_metrics(run / "metrics.jsonl").train[0].balance_loss)
    assert losses[1] > losses[0]
