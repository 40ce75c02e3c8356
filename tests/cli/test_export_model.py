"""``moesys export`` of runs and of model folders: the same options, the same promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_calls import Call
from safetensors.torch import load_file

from family_keys import FAMILY_KEYS
from model_folders import write_model
from moesys.errors import CheckpointError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_model(tmp_path / "source", FAMILY_KEYS["qwen3_moe"])
    return tmp_path / "source"


def test_a_model_is_converted_and_verified(source: Path, tmp_path: Path, moesys_command: Call) -> None:
    copy = tmp_path / "copy"
    answer = moesys_command(
        "export", source, "--to", copy, "--dtype", "bf16", "--experts", "stacked", "--shard-size", "16KiB", "--verify"
    )  # fmt: skip
    assert answer.status == 0, answer.err
    shards = list(copy.glob("model-*-of-*.safetensors"))
    tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert len(shards) > 1
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    lines = answer.out.splitlines()
    assert lines[0].startswith(f"wrote qwen3_moe layout to {copy}: ")
    assert lines[1] == f"verified: {len(tensors)} tensors are equal bit for bit"
    assert lines[2].startswith(
        "verified: the logits of a prompt are equal bit for bit to those of the source"
    )
    assert lines[3].startswith("verified: the change of dtype moves these logits, up to ")


def test_a_run_takes_the_same_options(run: Path, tmp_path: Path, moesys_command: Call) -> None:
    copy = tmp_path / "copy"
    answer = moesys_command(
        "export", run, "--to", copy, "--experts", "stacked", "--shard-size", "8KiB", "--verify"
    )
    assert answer.status == 0, answer.err
    assert len(list(copy.glob("model-*-of-*.safetensors"))) > 1
    assert "tensors are equal bit for bit" in answer.out
    assert "the logits of a prompt are equal bit for bit to those of the source" in answer.out
    assert "the change of dtype" not in answer.out
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    assert any(name.endswith("experts.gate_up_proj") for name in index["weight_map"])
    again = moesys_command("export", copy, "--to", tmp_path / "again", "--experts", "separate", "--verify")
    assert again.status == 0, again.err
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    moesys_command("export", run, "--to", tmp_path / "plain")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_rounded_to_bfloat16_verifies(run: Path, tmp_path: Path, moesys_command: Call) -> None:
    answer = moesys_command("export", run, "--to", tmp_path / "copy", "--dtype", "bf16", "--verify")
    assert answer.status == 0, answer.err
    assert "the logits of a prompt are equal bit for bit to those of the source" in answer.out


def test_a_run_that_does_not_verify_is_not_left(
    run: Path, tmp_path: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise CheckpointError("what was written is not the source")

    monkeypatch.setattr("moesys.training.export.verify_export", fail)
    answer = moesys_command("export", run, "--to", tmp_path / "copy", "--verify")
    assert (answer.status, answer.err) == (1, "error: what was written is not the source\n")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--experts", "fused"], "--experts ('fused') must be separate or stacked"),
        (["--shard-size", "2GB"], "--shard-size ('2GB') must be a size above 0 with a unit"),
        (["--shard-size", "0GiB"], "--shard-size ('0GiB') must be a size above 0 with a unit"),
        (["--dtype", "fp16"], "dtype fp16 is refused"),
        (["--dtype", "int8"], "dtype 'int8' is not known"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], reason: str, source: Path, tmp_path: Path, moesys_command: Call
) -> None:
    answer = moesys_command("export", source, "--to", tmp_path / "copy", *options)
    assert (answer.status, answer.out) == (1, "")
    assert reason in answer.error
    assert not (tmp_path / "copy").exists()


def test_the_source_and_full_folders_are_not_written(
    source: Path, run: Path, tmp_path: Path, moesys_command: Call
) -> None:
    for place in (source, source / "copy"):
        assert "lies in the folder that is read" in moesys_command("export", source, "--to", place).error
    for model in (source, run):
        answer = moesys_command("export", model, "--to", run / "checkpoints")
        assert "is not an empty folder; give another one with --to" in answer.error
