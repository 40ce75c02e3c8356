"""The folder of a run: what is saved with it, and when it may be made."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from tiny_runs import start

from moesys.config import load_config
from moesys.errors import CheckpointError, ConfigError
from moesys.training import RunDirectory
from moesys.training import run_directory as module
from moesys.training.run_directory import describe_environment


def test_a_new_run_saves_what_reproduces_it(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run", "training.seed=3", "data.seed=4", "runtime.threads=2")
    run = RunDirectory.open(tmp_path / "run")
    assert run.load_config() == trainer.config
    assert run.load_tokenizer().fingerprint == trainer.data.tokenizer.fingerprint
    environment = run.read_environment()
    assert environment["seeds"] == {"training": 3, "data": 4}
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["threads"] == 2
    assert environment["cores"] > 0
    assert environment["memory_bytes"] > 2**20
    assert {"date", "command", "moesys", "git_revision", "python", "platform", "cpu"} <= environment.keys()


def test_auto_is_resolved_in_the_saved_config(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("moesys.training.build.choose_faster_dtype", lambda device: torch.bfloat16)
    start(corpus, tmp_path / "run", "training.dtype=auto")
    assert RunDirectory.open(tmp_path / "run").load_config().training.dtype == "bf16"


def test_the_revision_is_that_of_the_checkout_and_says_dirty(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    revision = git("rev-parse", "HEAD")
    assert module._read_git_revision(tmp_path) == revision
    (tmp_path / "file").write_text("two")
    assert module._read_git_revision(tmp_path) == f"{revision}-dirty"


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert describe_environment(load_config())["git_revision"] is None


@pytest.mark.parametrize("left", ["config.toml", "metrics.jsonl", "checkpoints"])
def test_a_folder_that_holds_a_run_or_its_remains_is_refused(
    corpus: Path, tmp_path: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / left).mkdir() if left == "checkpoints" else (run / left).write_text("")
    monkeypatch.setattr("moesys.training.trainer.prepare_data", lambda *args: pytest.fail("too late"))
    with pytest.raises(ConfigError, match=r"already holds a run; go on with it \(moesys resume .*--run"):
        start(corpus, run)


def test_a_run_that_cannot_start_leaves_no_folder(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("moesys.training.trainer.build_model", fail)
    with pytest.raises(MemoryError):
        start(corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_refused_before_the_data_is_prepared(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesys.training.trainer.prepare_data", lambda *args: pytest.fail("too late"))
    with pytest.raises(ConfigError, match="is not a device"):
        start(corpus, tmp_path / "run", "runtime.device=gpu")


def test_a_file_in_the_way_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot create the run folder .*run: File exists"):
        start(corpus, tmp_path / "run")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run \(no config.toml\); give the folder"):
        RunDirectory.open(tmp_path)
