"""``moesys pack``: what it prints, what it refuses, and that other commands take what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from command_calls import Call
from typer.testing import CliRunner

from family_keys import FAMILY_KEYS
from model_folders import write_model
from moesys.checkpoint.load import load_model
from moesys.cli.pack import pack
from moesys.data import train_tokenizer
from moesys.errors import ConfigError

PackCall = Callable[..., str]


@pytest.fixture
def run_pack() -> PackCall:
    """Runs ``moesys pack ARGUMENTS`` and returns what it prints; raises what it raises."""
    app = typer.Typer()
    app.command()(pack)

    def call(*arguments: object) -> str:
        return (
            CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).stdout
        )

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    keys = FAMILY_KEYS["gpt_oss"] | {"vocab_size": 300}
    write_model(tmp_path / "source", keys)
    train_tokenizer(["to be or not to be"] * 3, 270).save(tmp_path / "source")
    return tmp_path / "source"


def test_parts_are_listed_with_their_bits(source: Path, tmp_path: Path, run_pack: PackCall) -> None:
    lines = run_pack(source, "--to", tmp_path / "file").splitlines()
    assert lines[0].startswith(f"wrote gpt_oss to {tmp_path / 'file'}: ")
    rows = {line.split()[0]: line.split() for line in lines[2:-1]}
    assert rows.keys() == {"embedding", "attention", "router", "norms", "head", "experts", "all"}
    assert all(rows[name][-1] == "32.00" for name in rows.keys() - {"experts", "all"})
    assert lines[-1] == f'next: moesys generate {tmp_path / "file"} -p "..."'
    assert "lossy" not in "\n".join(lines)


def test_what_is_lossy_is_said_to_be(source: Path, tmp_path: Path, run_pack: PackCall) -> None:
    lines = run_pack(source, "--to", tmp_path / "int8", "--dtype", "int8").splitlines()
    rounded = [line.split()[0] for line in lines if "  int8, off by 0." in line]
    assert rounded == ["attention", "head", "experts"]
    assert lines[-2].startswith("int8 is lossy: ")
    lines = run_pack(source, "--to", tmp_path / "bf16", "--dtype", "bf16").splitlines()
    assert lines[-2] == "lossy: float32 weights were rounded to bfloat16"
    assert load_model(tmp_path / "bf16").embedding.weight.dtype == torch.bfloat16


def test_the_object_for_programs(source: Path, tmp_path: Path, run_pack: PackCall) -> None:
    found = json.loads(run_pack(source, "--to", tmp_path / "file", "--dtype", "int8", "--json"))
    assert (found["family"], found["weights"], found["dtype"], found["is_lossy"]) == (
        "gpt_oss", "int8", "float32", True
    )  # fmt: skip
    assert found["num_bytes"] == (tmp_path / "file").stat().st_size
    experts, norms = found["parts"]["experts"], found["parts"]["norms"]
    assert 0 < experts["mean_error"] < experts["largest_error"] < 0.02
    assert (norms["mean_error"], norms["largest_error"], norms["bits_per_weight"]) == (None, None, 32)


def test_a_file_is_replaced_only_when_asked_for(source: Path, tmp_path: Path, run_pack: PackCall) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match=r"exists; .* replace it with --overwrite"):
        run_pack(source, "--to", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    run_pack(source, "--to", tmp_path / "file", "--overwrite")
    assert load_model(tmp_path / "file").config.num_layers == 2


def test_a_file_in_no_folder_is_refused(source: Path, tmp_path: Path, run_pack: PackCall) -> None:
    with pytest.raises(ConfigError, match=r"the folder of .*none/file does not exist; make it first"):
        run_pack(source, "--to", tmp_path / "none" / "file")


def test_nothing_writes_text_without_a_tokenizer(source: Path, tmp_path: Path, run_pack: PackCall) -> None:
    (source / "tokenizer.json").unlink()
    lines = run_pack(source, "--to", tmp_path / "file").splitlines()
    assert "moesys generate" not in "\n".join(lines)
    assert "there was no tokenizer.json to come along" in lines[-1]


@pytest.mark.parametrize("dtype", ["fp16", "int4"])
def test_other_dtypes_are_refused(dtype: str, source: Path, tmp_path: Path, run_pack: PackCall) -> None:
    with pytest.raises(ConfigError, match=rf"--dtype \('{dtype}'\) must be fp32, bf16 or int8"):
        run_pack(source, "--to", tmp_path / "file", "--dtype", dtype)
    assert not (tmp_path / "file").exists()


def test_other_commands_take_a_packed_file(
    source: Path, tmp_path: Path, run_pack: PackCall, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    run_pack(source, "--to", file)
    expected = moesys_command("generate", source, "-p", "be", "-n", 4, "--temperature", 0)
    answer = moesys_command("generate", file, "-p", "be", "-n", 4, "--temperature", 0)
    assert (answer.status, answer.out) == (0, expected.out), answer.err
    budget = moesys_command(
        "generate", file, "-p", "be", "-n", 4, "--temperature", 0, "--host-memory", "1GiB"
    )
    assert (budget.status, budget.out) == (0, expected.out), budget.err
    assert "of 12 experts" in budget.err
    packed = moesys_command("pack", source, "--to", file, "--dtype", "int8")
    assert (packed.status, packed.out) == (1, "")
    assert packed.error.startswith(f"error: {file} exists; ")
    assert moesys_command("pack", source, "--to", file, "--dtype", "int8", "--overwrite").status == 0
    inspected = moesys_command("inspect", file, "--check")
    assert inspected.status == 0
    assert "int8" in inspected.out
    assert "all weights are finite" in inspected.out
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 8)
    evaluated = moesys_command("eval", file, "--data", tmp_path / "text.txt", "--format", "text")
    assert evaluated.status == 0, evaluated.err
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    assert moesys_command("chat", file).status == 0
    refused = moesys_command("export", file, "--to", tmp_path / "again")
    assert refused.status == 1
    assert "is a file, and the folder of a Hugging Face checkpoint is needed here" in refused.error
