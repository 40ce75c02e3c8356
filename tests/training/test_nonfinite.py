"""A step with NaN or Inf changes nothing, is recorded, and stops the run when it keeps happening."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import start

from moesys.errors import NonFiniteError
from moesys.training import Trainer
from moesys.training.metrics import read_metrics


def poison(trainer: Trainer, name: str) -> torch.Tensor:
    """Writes a NaN into a parameter and returns what was there."""
    parameter = dict(trainer.model.named_parameters())[name]
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")
    return before


def test_a_skipped_step_leaves_every_bit(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    trainer.take_step()
    name = "final_norm.weight"
    before = poison(trainer, name)
    state = {key: tensor.clone() for key, tensor in trainer.optimizer.export_state().items()}
    result = trainer.take_step()
    assert not result.is_finite
    after = trainer.optimizer.export_state()
    assert all(torch.equal(state[key], after[key]) for key in state if key != f"model.{name}")
    with torch.no_grad():
        dict(trainer.model.named_parameters())[name].copy_(before)
    assert trainer.take_step().is_finite


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("embedding.weight", "the parameter embedding.weight"),
        ("blocks.1.attention.qkv_proj.weight", "the parameter blocks.1.attention.qkv_proj.weight"),
        ("blocks.0.feed_forward.experts.down_EDF", "the parameter blocks.0.feed_forward.experts.down_EDF"),
        ("blocks.0.feed_forward.router.weight_ED", "the parameter blocks.0.feed_forward.router.weight_ED"),
    ],
)
def test_a_run_that_stays_nan_stops_and_names_the_place(
    corpus: Path, tmp_path: Path, parameter: str, place: str
) -> None:
    trainer = start(corpus, tmp_path / "run", "training.max_skipped_steps=3")
    poison(trainer, parameter)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .*it began in ") as caught:
        trainer.train()
    assert place in str(caught.value)
    assert "lower training.learning_rate" in str(caught.value)
    events = read_metrics(tmp_path / "run" / "metrics.jsonl").events
    assert [event.event for event in events] == ["skipped_step"] * 3


@pytest.mark.parametrize("layer", [0, 1])
def test_activations_that_overflow_are_traced_to_their_layer(
    corpus: Path, tmp_path: Path, layer: int
) -> None:
    trainer = start(corpus, tmp_path / "run", "training.max_skipped_steps=2")
    attention = trainer.model.blocks[layer].attention
    attention.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    with pytest.raises(NonFiniteError, match=f"it began in layer {layer}, attention"):
        trainer.train()


def test_a_good_step_resets_the_count(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = start(corpus, tmp_path / "run", "training.max_skipped_steps=2")
    take_step: Callable = trainer.take_step
    name = "final_norm.weight"

    def take_every_other_step_with_nan():
        if trainer.step % 2:
            return take_step()
        before = poison(trainer, name)
        result = take_step()
        with torch.no_grad():
            dict(trainer.model.named_parameters())[name].copy_(before)
        return result

    monkeypatch.setattr(trainer, "take_step", take_every_other_step_with_nan)
    assert trainer.train().is_finished
