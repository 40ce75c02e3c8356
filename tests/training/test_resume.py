"""Law 5: a run that was cut and resumed goes on in the same bits as one that was not."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
import torch
from tiny_runs import STEPS, resume, start

from moesys.checkpoint import load_newest_checkpoint
from moesys.errors import CheckpointError, DataError
from moesys.training import PlainConsole, Trainer


def hash_state(run: Path) -> dict[str, str]:
    state = load_newest_checkpoint(run / "checkpoints", on_damage=pytest.fail)
    assert state.step == STEPS
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in state.tensors.items()
    }


@pytest.mark.parametrize("cut", [1, 4, 8])
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("training.dtype=bf16",),
        ("training.micro_batch_sequences=2", "memory.activation_checkpointing=true"),
        ("training.schedule=wsd", "training.beta2=0.9"),
    ],
    ids=["fp32", "bf16", "accumulated-and-recomputed", "wsd"],
)
def test_a_resumed_run_ends_in_the_same_bits(
    corpus: Path, tmp_path: Path, cut: int, more: tuple[str, ...]
) -> None:
    start(corpus, tmp_path / "straight", *more).train()
    trainer = start(corpus, tmp_path / "cut", *more)
    for _ in range(cut):
        trainer.take_step()
    trainer.save()
    outcome = resume(tmp_path / "cut").train()
    assert outcome.is_finished
    assert hash_state(tmp_path / "cut") == hash_state(tmp_path / "straight")


def test_steps_consume_no_global_randomness(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    before = torch.get_rng_state()
    trainer.take_step()
    assert torch.equal(torch.get_rng_state(), before)


def test_another_config_is_refused_with_a_diff(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    trainer.take_step()
    trainer.save()
    file = tmp_path / "run" / "config.toml"
    file.write_text(file.read_text().replace("top_k = 2", "top_k = 3"))
    with pytest.raises(CheckpointError, match=r"another config:\nmodel.top_k: checkpoint 2, now 3"):
        resume(tmp_path / "run")


def test_settings_that_change_no_weight_may_change(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    trainer.take_step()
    trainer.save()
    file = tmp_path / "run" / "config.toml"
    file.write_text(file.read_text().replace("log_every = 2", "log_every = 3"))
    assert resume(tmp_path / "run").step == 1


def test_a_changed_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    trainer.take_step()
    trainer.save()
    (corpus / "0.txt").write_text("something else entirely\n" * 30)
    with pytest.raises(DataError, match="has changed since the checkpoint"):
        resume(tmp_path / "run")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    for _ in range(2):
        trainer.take_step()
        newest = trainer.save()
    [shard] = newest.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    output = io.StringIO()
    resumed = Trainer.resume(tmp_path / "run", PlainConsole(STEPS, output))
    assert resumed.step == 1
    assert "WARNING" in output.getvalue()
    assert str(shard) in output.getvalue()
