"""``moesys bench cache``: the table, the JSON and the picture of one log."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moesys.cli.bench import bench_app
from moesys.errors import ConfigError, DataError, MissingExtraError
from moesys.moe.routing_log import RoutingLog
from moesys.store.policy import PolicyName


@pytest.fixture
def log(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    tables = {
        layer: torch.rand(40, 8, generator=draw).argsort(dim=1)[:, :2].to(torch.int16) for layer in (0, 1)
    }
    RoutingLog(tables, {0: 8, 1: 8}, torch.arange(41), "a test").write(tmp_path / "log.safetensors")
    return tmp_path / "log.safetensors"


def call(*arguments: object) -> str:
    result = CliRunner().invoke(bench_app, ["cache", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_table_has_a_line_per_size_and_predictor(log: Path) -> None:
    lines = call(log, "--slots", "4, 8,16").splitlines()
    assert lines[0] == "40 tokens in 40 steps through 2 layers, 16 experts, recorded from a test"
    header = next(line for line in lines if line.split()[:1] == ["slots"])
    assert header.split()[3:] == ["belady", *(name.value for name in PolicyName)]
    sizes = [line.split()[:2] for line in lines if line.split()[:1] in (["4"], ["8"], ["16"])]
    assert sizes == [["4", "25%"], ["8", "50%"], ["16", "100%"]]
    last = next(line for line in lines if line.split()[:1] == ["16"])
    assert last.split()[2:] == ["16", "(90.0%)"] * 5
    assert any(line.startswith("guesses of what the next layer lacks, with 8 slots") for line in lines)
    assert {"next-layer", "last-iteration", "sample-paths"} <= {line.split()[0] for line in lines if line}


def test_the_json_holds_the_same(log: Path) -> None:
    found = json.loads(call(log, "--json"))
    assert (found["num_tokens"], found["num_experts"], found["origin"]) == (40, 16, "a test")
    assert [point["slots"] for point in found["curves"]["lru"]] == [2, 4, 6, 8, 10, 12, 14, 16]
    for points in found["curves"].values():
        for point, best in zip(points, found["curves"]["belady"], strict=True):
            assert point["demands"] == 160
            assert point["loads"] >= best["loads"]
            assert point["hit_rate"] == pytest.approx(1 - point["loads"] / 160)
    assert found["predictors"]["next-layer"]["slots"] == 8
    for score in found["predictors"].values():
        assert score["guessed"] == score["right"] + score["wasted"]


def test_sequences_are_decoded_together(log: Path) -> None:
    found = json.loads(call(log, "--json", "--sequences", 4, "--slots", "8"))
    assert (found["num_tokens"], found["num_steps"]) == (40, 10)
    assert found["curves"]["lru"][0]["demands"] < 160


def test_the_picture_is_a_png(log: Path, tmp_path: Path) -> None:
    call(log, "--slots", "4,8", "--plot", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("slots", ["", "0", "4,", "4,-1", "many", "4.5"])
def test_slots_are_numbers(slots: str, log: Path) -> None:
    with pytest.raises(ConfigError, match=r"--slots \(.*\) must be numbers of 1 or more"):
        call(log, "--slots", slots)


def test_a_picture_that_cannot_be_drawn_is_refused_at_once(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--plot \(.*curves\.pdf\) must end in \.png"):
        call(log, "--plot", tmp_path / "curves.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"drawing the miss curves needs the package 'matplotlib'"):
        call(log, "--plot", tmp_path / "curves.png")
    call(log, "--slots", "8")


def test_a_picture_has_a_folder_to_lie_in(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoutingLog, "read", lambda path: pytest.fail("work was begun"))
    (tmp_path / "folder.png").mkdir()
    for plot in (tmp_path / "none" / "curves.png", tmp_path / "folder.png"):
        with pytest.raises(
            ConfigError, match=rf"--plot {plot} cannot be written: it must be a file in a folder"
        ):
            call(log, "--plot", plot)
    assert not (tmp_path / "none").exists()


def test_more_slots_than_experts_are_refused(log: Path) -> None:
    with pytest.raises(ConfigError, match=r"--slots \('4,17'\) must not exceed the experts of the log, 16"):
        call(log, "--slots", "4,17")


def test_a_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path} is a folder, and a file of recorded routing is needed"):
        call(tmp_path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(DataError, match="is not a safetensors file"):
        call(tmp_path / "x")
