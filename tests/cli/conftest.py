"""The command line called in this process, and one small run and its export for the whole folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_calls import SETTINGS, Answer, Call

import moesys.cli.app
from moesys.cli import main


@pytest.fixture
def moesys_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs ``moesys ARGUMENTS`` as its entry point does."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["moesys", *map(str, arguments)])
        monkeypatch.setitem(moesys.cli.app._state, "debug", False)
        capsys.readouterr()
        status: object = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        assert isinstance(status, int)
        return Answer(status, out, err)

    return call


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GEMM rate is measured, which takes longer than a tiny run, and the allocator stays as it is."""
    monkeypatch.setattr("moesys.training.log.measure_gemm_rate", lambda dtype, device: 1e12)
    monkeypatch.setattr("moesys.training.trainer.keep_freed_memory", lambda: False)


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    for number in range(5):
        lines = [f"line {i} of file {number}: {i * number % 17} apples\n" for i in range(12)]
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def train(moesys_command: Call, corpus: Path, tmp_path: Path) -> Call:
    """Runs ``moesys [--debug] train`` with the small settings and more."""

    def call(*more: str, run: str = "run", debug: bool = False) -> Answer:
        settings = [*SETTINGS, f'data.source="{corpus}"', *more]
        flags = ["--debug"] if debug else []
        return moesys_command(*flags, "train", *settings, "--run", tmp_path / run)

    return call


@pytest.fixture
def run(train: Call, tmp_path: Path) -> Path:
    answer = train()
    assert answer.status == 0, answer.err
    return tmp_path / "run"


@pytest.fixture
def model(run: Path, moesys_command: Call, tmp_path: Path) -> Path:
    answer = moesys_command("export", run, "--to", tmp_path / "model")
    assert answer.status == 0, answer.err
    return tmp_path / "model"
