"""From a run to a model folder: the same model, a card that tells the truth, all of it or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_runs import STEPS, start

from moesys.checkpoint import FileSystem, list_checkpoints, load_text_model
from moesys.errors import CheckpointError, ConfigError, DiskSpaceError, ModelFormatError
from moesys.models import Decoder, DocumentAttend
from moesys.training import Trainer, export_run


@pytest.fixture
def trained(corpus: Path, tmp_path: Path) -> Trainer:
    trainer = start(corpus, tmp_path / "run", "training.learning_rate=0.02")
    trainer.train()
    return trainer


def compute_logits(model: Decoder) -> torch.Tensor:
    tokens = torch.arange(32).view(2, 16) * 9
    with torch.no_grad():
        output = model(tokens, torch.arange(16).repeat(2, 1), DocumentAttend(torch.zeros_like(tokens)))
        return model.compute_logits(output.hidden_BSD)


def export(trainer: Trainer, target: Path, dtype: str | None = None, files: FileSystem | None = None):
    return export_run(trainer.run.path, target, dtype, on_damage=pytest.fail, files=files)


def test_the_folder_is_the_trained_model(trained: Trainer, tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    exported = export(trained, target)
    loaded = load_text_model(target)
    assert torch.equal(compute_logits(loaded.decoder), compute_logits(trained.model))
    assert loaded.tokenizer.fingerprint == trained.data.tokenizer.fingerprint
    assert exported.step == STEPS
    assert exported.num_parameters == trained.model.count_parameters()
    assert exported.num_bytes == sum(
        file.stat().st_size for file in target.iterdir() if file.name != "README.md"
    )
    assert exported.describe().startswith(f"step {STEPS}, ")
    assert sorted(path.name for path in target.parent.iterdir()) == ["model"]


def test_configs_name_the_end_of_text_and_the_dtype(trained: Trainer, tmp_path: Path) -> None:
    export(trained, tmp_path / "model", "bf16")
    end_id = trained.data.tokenizer.end_of_text_id
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    for keys in (config, generation):
        assert (keys["bos_token_id"], keys["eos_token_id"], keys["pad_token_id"]) == (end_id,) * 3
    assert generation["do_sample"] is True
    assert generation["temperature"] > 0
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 16
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_card_says_what_is_so(trained: Trainer, tmp_path: Path) -> None:
    target = tmp_path / "my-model"
    export(trained, target)
    card = (target / "README.md").read_text()
    assert "\n# my-model\n" in card
    assert f"`{trained.config.data.source}`" in card
    assert trained.run.config_file.read_text().strip() in card
    assert f"revision {trained.run.read_environment()['git_revision']}" in card
    checksums = dict(re.findall(r"^\| `([^`]+)` \| [\d,]+ \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    assert checksums.keys() == {file.name for file in target.iterdir()} - {"README.md"}
    assert checksums.keys() >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name, digest in checksums.items():
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d.]*) \| ([\d.]*) \|$", card, re.MULTILINE)
    assert [row[0] for row in rows] == ["2", "4", "6", "8", "9", "9"]
    assert rows[-1][3] == f"{trained.evaluate().bits_per_byte:.4f}"
    assert all(float(bits) > 0 for *_, bits, _ in rows[:-1])


def test_the_dtype_is_the_runs_own_unless_told(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run", "training.dtype=bf16")
    trainer.train()
    export(trainer, tmp_path / "own")
    export(trainer, tmp_path / "masters", "fp32")
    masters = trainer.optimizer.export_state()
    for name, parameter in load_text_model(tmp_path / "masters").decoder.named_parameters():
        assert torch.equal(parameter, masters[f"model.{name}"]), name
    for name, parameter in load_text_model(tmp_path / "own").decoder.named_parameters():
        assert torch.equal(parameter.bfloat16(), masters[f"model.{name}"].bfloat16()), name
        assert parameter.dtype == (torch.float32 if "router" in name else torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "message"), [("fp16", "fp16 is refused"), ("int8", "'int8' is not known; use fp32 or bf16")]
)
def test_other_dtypes_are_refused(trained: Trainer, tmp_path: Path, dtype: str, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        export(trained, tmp_path / "model", dtype)


def test_a_target_with_something_in_it_is_left_alone(trained: Trainer, tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine").write_text("kept")
    file.write_text("kept")
    for target in (full, file):
        with pytest.raises(
            ConfigError, match="exists and is not an empty folder; give another one with --to"
        ):
            export(trained, target)
    assert [path.name for path in full.iterdir()] == ["mine"]
    assert file.read_text() == "kept"


def test_an_empty_target_is_filled_also_by_its_shortest_name(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    export(trained, tmp_path / "link")
    assert (tmp_path / "empty" / "config.json").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_run(trained.run.path, Path("."), None, on_damage=pytest.fail)
    assert (tmp_path / "here" / "config.json").exists()


class FailingFiles(FileSystem):
    """Lets a number of system calls pass and then finds the disk full."""

    def __init__(self, num_calls: int) -> None:
        self.left = num_calls

    def system_call(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left < 0 and call in (os.open, os.write, os.writev, os.fsync, os.rename):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().system_call(call, *args, **kwargs)


class WatchedFiles(FileSystem):
    """Remembers which files were synced."""

    def __init__(self) -> None:
        self.synced: set[int] = set()

    def system_call(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        if call is os.fsync:
            self.synced.add(os.fstat(args[0]).st_ino)
        return super().system_call(call, *args, **kwargs)


def test_every_file_of_the_folder_is_on_the_disk(trained: Trainer, tmp_path: Path) -> None:
    files = WatchedFiles()
    export(trained, tmp_path / "model", files=files)
    for path in (tmp_path, tmp_path / "model", *(tmp_path / "model").iterdir()):
        assert path.stat().st_ino in files.synced, path


def test_a_failure_leaves_nothing_under_any_name(trained: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    failures: list[str] = []
    for num_calls in range(200):
        try:
            export(trained, folder / "model", files=FailingFiles(num_calls))
        except DiskSpaceError as error:
            failures.append(str(error))
        else:
            break
        if "sync the folder" in failures[-1] and (folder / "model").exists():
            # Only its name may not survive a power cut.
            assert load_text_model(folder / "model").tokenizer
            shutil.rmtree(folder / "model")
        assert list(folder.iterdir()) == []
    assert all(str(folder) in failure for failure in failures)
    assert len(failures) > 8
    assert (folder / "model" / "README.md").exists()


def test_a_model_that_no_layout_holds_is_refused_with_the_reasons(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run", "model.shared_expert_intermediate_size=8")
    trainer.take_step()
    trainer.save()
    with pytest.raises(ModelFormatError, match=r"qwen3_moe: .*\(model.shared_expert_intermediate_size\)"):
        export(trainer, tmp_path / "model")
    assert not any(path.name.startswith("model") for path in tmp_path.iterdir())


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_exported(
    corpus: Path, tmp_path: Path
) -> None:
    trainer = start(corpus, tmp_path / "run", "training.checkpoint_every=5")
    trainer.train()
    assert list_checkpoints(trainer.run.checkpoints_folder) == [5, STEPS]
    newest = trainer.run.checkpoints_folder / f"step-{STEPS:08d}"
    (newest / "state.json").write_text("{}")
    told: list[str] = []
    exported = export_run(trainer.run.path, tmp_path / "model", None, told.append)
    assert exported.step == 5
    assert len(told) == 1
    assert str(newest) in told[0]


def test_a_run_without_a_checkpoint_is_refused(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run")
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        export(trainer, tmp_path / "model")
