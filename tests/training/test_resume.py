"""Law 5: a run that was cut and resumed goes on in the same bits as one that was not."""

from __future__ import annotations

import hashlib
import io
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SETTINGS, STEPS, resume, start

from moesys.checkpoint import FileSystem, load_newest_checkpoint
from moesys.config import load_config
from moesys.errors import CheckpointError, ConfigError, DataError, DiskSpaceError, NonFiniteError
from moesys.kernels.native.cpu_level import find_cpu_level
from moesys.kernels.products import prefers_native
from moesys.training import PlainConsole, Trainer
from moesys.training.compatibility import Backend, require_same_config
from moesys.training.metrics import read_metrics
from moesys.training.step import StepResult


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


def take_steps(trainer: Trainer, until: int) -> list[float]:
    """Takes steps, the third one with an infinite loss and so skipped; returns each step's loss."""
    losses = []
    while trainer.step < until:
        with ExitStack() as stack:
            if trainer.step == 2:
                norm = trainer.model.final_norm
                hook = norm.register_forward_hook(lambda module, inputs, output: output * float("inf"))
                stack.callback(hook.remove)
            result = trainer.take_step()
        assert result.is_finite == (trainer.step != 3)
        losses.append(result.loss)
    return losses


@pytest.mark.parametrize("cut", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_later_loss_is_the_same_also_around_a_skipped_step(
    corpus: Path, tmp_path: Path, cut: int, dtype: str
) -> None:
    more = (f"training.dtype={dtype}", "training.micro_batch_sequences=2", "training.batch_sequences=6")
    straight = start(corpus, tmp_path / "straight", *more)
    losses = take_steps(straight, STEPS)
    first = start(corpus, tmp_path / "cut", *more)
    take_steps(first, cut)
    first.save()
    second = resume(tmp_path / "cut")
    assert [str(loss) for loss in take_steps(second, STEPS)] == [str(loss) for loss in losses[cut:]]
    for trainer in (straight, second):
        trainer.save()
    assert hash_state(tmp_path / "cut") == hash_state(tmp_path / "straight")


def test_these_runs_cross_an_epoch(corpus: Path, tmp_path: Path) -> None:
    """What the tests above cut lies in the middle of an epoch, and the runs go on into the next."""
    trainer = start(corpus, tmp_path / "run")
    sequences = (trainer.data.train.num_tokens - 1) // 16
    assert 4 < sequences < STEPS * 4


def test_skipped_steps_in_a_row_are_counted_across_a_resume(corpus: Path, tmp_path: Path) -> None:
    more = ("training.max_skipped_steps=3", "training.checkpoint_every=2")
    for first_step, last_step in [(0, 3), (3, 4)]:
        trainer = start(corpus, tmp_path / "run", *more) if first_step == 0 else resume(tmp_path / "run")
        assert trainer.step == first_step
        trainer.model.final_norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        with pytest.raises(NonFiniteError, match=rf"3 steps in a row .* up to step {last_step};") as caught:
            trainer.train()
        assert (
            f"the last good state is in {tmp_path / 'run' / 'checkpoints' / f'step-{last_step:08d}'}"
            in str(caught.value)
        )


def test_a_run_that_died_before_its_first_checkpoint_goes_on_from_step_0(
    corpus: Path, tmp_path: Path
) -> None:
    start(corpus, tmp_path / "straight").train()
    start(corpus, tmp_path / "died").take_step()
    trainer = resume(tmp_path / "died")
    assert trainer.step == 0
    trainer.train()
    assert hash_state(tmp_path / "died") == hash_state(tmp_path / "straight")


def test_a_run_can_be_resumed_from_another_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus.parent)
    trainer = start(Path(corpus.name), tmp_path / "run")
    trainer.take_step()
    trainer.save()
    monkeypatch.chdir("/")
    assert resume(tmp_path / "run").step == 1


def test_the_runs_own_tokenizer_is_used_when_all_others_are_gone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start(corpus, tmp_path / "run")
    trainer.take_step()
    trainer.save()
    given = tmp_path / "given"
    trainer.data.tokenizer.save(given)
    settings = [s for s in SETTINGS if not s.startswith("data.vocab_size")]
    config = load_config(None, [*settings, f'data.source="{corpus}"', f'data.tokenizer="{given}"'])
    Trainer.start(config, tmp_path / "with-given", PlainConsole(STEPS, io.StringIO())).save()
    shutil.rmtree(given)
    monkeypatch.setenv("MOESYS_CACHE", str(tmp_path / "another cache"))
    monkeypatch.setattr("moesys.data.prepare.train_tokenizer", pytest.fail)
    for run in ("run", "with-given"):
        assert resume(tmp_path / run).data.fingerprint == trainer.data.fingerprint


def test_tokens_count_the_steps_that_changed_something(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    take_steps(trainer, 5)
    trainer.save()
    resumed = resume(tmp_path / "run")
    resumed.train()
    applied = (STEPS - 1) * resumed.tokens_per_step
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert resumed.position.tokens == applied
    assert (metrics.train[-1].tokens, metrics.evaluations[-1].tokens) == (applied, applied)


@pytest.mark.parametrize(
    ("experts", "expected"), [("[4,0]", "experts [4, 0] top-2"), ("0", "hidden 16, dense")]
)
def test_the_description_names_experts_only_where_there_are_some(
    corpus: Path, tmp_path: Path, experts: str, expected: str
) -> None:
    settings = [s for s in SETTINGS if "expert" not in s] + [f"model.num_experts={experts}"]
    config = load_config(None, [*settings, f'data.source="{corpus}"'])
    lines = Trainer.start(config, tmp_path / "run", PlainConsole(STEPS, io.StringIO())).describe()
    assert lines[1].endswith(expected)


def test_several_processes_are_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun has started 2"):
        start(corpus, tmp_path / "run")


def test_a_model_that_no_layout_holds_is_announced_before_training(corpus: Path, tmp_path: Path) -> None:
    output = io.StringIO()
    config = start(corpus, tmp_path / "a", "model.shared_expert_intermediate_size=8").config
    Trainer.start(config, tmp_path / "b", PlainConsole(STEPS, output))
    assert "`moesys export` will refuse it" in output.getvalue()


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
    [damage, event] = read_metrics(tmp_path / "run" / "metrics.jsonl").events
    assert (damage.event, damage.step, event.event) == ("damaged_checkpoint", 1, "resumed")
    assert str(shard) in damage.message


def test_a_full_disk_leaves_the_old_checkpoint_and_says_what_is_needed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start(corpus, tmp_path / "run")
    trainer.take_step()
    old = trainer.save()
    trainer.take_step()
    monkeypatch.setattr(FileSystem, "free_bytes", lambda self, path: 1000)
    with pytest.raises(DiskSpaceError, match=r"needs \d+ bytes .*1000 bytes are free.*untouched") as caught:
        trainer.save()
    assert str(tmp_path / "run" / "checkpoints") in str(caught.value)
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert resume(tmp_path / "run").step == 1


def test_a_resumed_metrics_file_has_each_step_once(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run", "training.checkpoint_every=4")
    take_step = trainer.take_step

    def crash_at_seven() -> StepResult:
        if trainer.step == 7:
            raise OSError("the power went")
        return take_step()

    trainer.take_step = crash_at_seven
    with pytest.raises(OSError, match="power"):
        trainer.train()
    resume(tmp_path / "run").train()
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line.step for line in metrics.train] == [2, 4, 6, 8, 9]
    assert [line.step for line in metrics.evaluations] == [9]
    assert [(event.event, event.step) for event in metrics.events] == [
        ("checkpoint", 4), ("resumed", 4), ("checkpoint", 8), ("checkpoint", 9)
    ]  # fmt: skip


SAVED = {"threads": 2, "products": "torch", "cpu_level": "avx2"}


def resume_as(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: dict[str, Any], now: Backend
) -> str:
    """Saves a run whose checkpoint tells of ``saved`` alone, resumes it on ``now`` and returns what was printed."""
    trainer = start(corpus, tmp_path / "run")
    trainer.take_step()
    with monkeypatch.context() as patched:
        patched.setattr(Backend, "to_metadata", lambda backend: saved)
        trainer.save()
    output = io.StringIO()
    monkeypatch.setattr(Backend, "find", lambda device: now)
    resumed = Trainer.resume(tmp_path / "run", PlainConsole(STEPS, output))
    assert resumed.step == 1
    return output.getvalue()


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (Backend(3, "torch", "avx2"), "saved with 2 threads and goes on with 3 threads: sums may differ"),
        (Backend(2, "native", "avx2"), "saved with torch products and goes on with native products: sums"),
        (Backend(2, "torch", "avx512"), "saved with CPU level avx2 and goes on with CPU level avx512: sums"),
        (
            Backend(1, "native", "baseline"),
            "saved with 2 threads, torch products, CPU level avx2 and goes on with 1 threads, native products, CPU "
            "level baseline: sums",
        ),
    ],
    ids=["threads", "products", "cpu-level", "all"],
)
def test_another_backend_is_told_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: Backend, told: str
) -> None:
    output = resume_as(corpus, tmp_path, monkeypatch, SAVED, now)
    assert output.count("WARNING: the run was ") == 1
    assert told in output


def test_the_same_backend_is_not_told(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "WARNING" not in resume_as(corpus, tmp_path, monkeypatch, SAVED, Backend(2, "torch", "avx2"))


def test_a_checkpoint_that_names_only_its_threads_stays_readable(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = resume_as(corpus, tmp_path, monkeypatch, {"threads": 2}, Backend(2, "native", "avx512"))
    assert "WARNING" not in output


@pytest.mark.parametrize(("kernel", "products"), [("torch", "torch"), ("reference", "torch")])
def test_a_checkpoint_says_what_computed_it(corpus: Path, tmp_path: Path, kernel: str, products: str) -> None:
    trainer = start(corpus, tmp_path / "run", f"runtime.kernel={kernel}")
    trainer.take_step()
    trainer.save()
    metadata = load_newest_checkpoint(tmp_path / "run" / "checkpoints", on_damage=pytest.fail).metadata
    assert metadata["products"] == products
    assert metadata["cpu_level"] == find_cpu_level().name
    assert metadata["threads"] == torch.get_num_threads()


def test_auto_says_native_where_native_products_train(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOESYS_KERNEL", raising=False)
    trainer = start(corpus, tmp_path / "run")
    expected = "native" if prefers_native(torch.empty(0)) else "torch"
    assert trainer._find_backend().products == expected


def test_a_config_from_before_a_key_existed_has_its_default() -> None:
    config = load_config(None, SETTINGS)
    saved = config.model_dump(mode="json")
    for key in ("expert_activation", "expert_bias", "expert_limit", "expert_alpha"):
        del saved["model"][key]
    require_same_config(saved, config)
    with pytest.raises(CheckpointError, match=r"model\.expert_bias: checkpoint (F|f)alse, now (T|t)rue"):
        require_same_config(saved, load_config(None, [*SETTINGS, "model.expert_bias=true"]))
