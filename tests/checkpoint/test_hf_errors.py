"""Model folders that cannot be loaded say what is wrong and what to do; nothing outside the folder is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesys.checkpoint import hf, load_model, save_model
from moesys.errors import ModelFormatError
from moesys.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    DenseConfig,
    QKNorm,
    RopeConfig,
    initialize_weights,
)
from moesys.moe import MoEConfig

WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def make_decoder(*, tie: bool = True) -> Decoder:
    attention = AttentionConfig(4, 2, 6, RopeConfig(6), QKNorm.PER_HEAD)
    layers = (MoEConfig(4, 2, 6), DenseConfig(10))
    model = Decoder(DecoderConfig(23, 12, (attention,) * 2, layers, tie_embeddings=tie))
    initialize_weights(model, seed=0, std=0.5)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    save_model(make_decoder(), path, torch.float32, {})
    return path


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "sharded"
    path.mkdir()
    monkeypatch.setattr(hf, "_MAX_SHARD_BYTES", 2000)
    save_model(make_decoder(), path, torch.float32, {})
    return path


def edit_config(folder: Path, **changes: Any) -> None:
    keys = json.loads((folder / "config.json").read_text()) | changes
    keys = {name: value for name, value in keys.items() if value is not KeyError}
    (folder / "config.json").write_text(json.dumps(keys))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelFormatError) as caught:
        load_model(folder)
    for word in words:
        assert word in str(caught.value)


def test_a_whole_folder_loads_and_tells_its_progress(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = load_model(folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(load_file(folder / WEIGHTS)))]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_is_no_model_folder(folder: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", "is not a folder; give the folder of a Hugging Face checkpoint")
    assert_refused(folder / WEIGHTS, "is not a folder")
    (folder / "config.json").unlink()
    assert_refused(folder, "has no config.json")


def test_a_run_must_be_exported_first(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    assert_refused(tmp_path, "is a training run; export it first: moesys export", "--to DIR")


@pytest.mark.parametrize(
    ("contents", "word"),
    [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[1]", "must hold a JSON object")],
)
def test_a_config_that_is_no_object(folder: Path, contents: bytes, word: str) -> None:
    (folder / "config.json").write_bytes(contents)
    assert_refused(folder, "config.json", word)


def test_an_unknown_family_names_those_that_are_known(folder: Path) -> None:
    edit_config(folder, model_type="qwen2_moe")
    assert_refused(folder, "'qwen2_moe' is not supported", "qwen3_moe, mixtral", "the nearest is 'qwen3_moe'")
    edit_config(folder, model_type="gpt2")
    assert_refused(folder, "'gpt2' is not supported (supported: qwen3_moe, mixtral)")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, ["rope_type 'yarn'"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"type": "linear", "rope_theta": 1e4}}, ["['type'] are not supported"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "only null is"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "only 'silu' is"]),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            ["quantization_config", "give unquantised weights"],
        ),
        ({"dtype": "float64"}, ["dtype 'float64'", "supported: float32, bfloat16, float16"]),
        ({"dtype": ["float32"]}, ["dtype ['float32']"]),
        ({"hidden_size": KeyError}, ["lacks the key 'hidden_size' that a qwen3_moe needs"]),
        ({"num_key_value_heads": KeyError}, ["lacks the key 'num_key_value_heads'"]),
        ({"rope_parameters": None, "rope_theta": KeyError}, ["lacks the key 'rope_theta'"]),
        ({"use_sliding_window": True, "sliding_window": KeyError}, ["lacks the key 'sliding_window'"]),
        ({"num_attention_heads": 0, "head_dim": None}, ["config.json holds a value that no qwen3_moe has"]),
        ({"num_hidden_layers": "two"}, ["config.json holds a value that no qwen3_moe has"]),
        ({"decoder_sparse_step": 0}, ["config.json holds a value that no qwen3_moe has"]),
    ],
)
def test_configs_that_cannot_be_read(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_config(folder, **changes)
    assert_refused(folder, *words)


def test_missing_and_unexpected_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"strange": torch.zeros(1)}))
    assert_refused(folder, "0 missing [], 1 not expected ['strange']")
    edit_tensors(folder, lambda tensors: tensors.pop(Q_PROJ))
    assert_refused(folder, f"1 missing ['{Q_PROJ}'], 1 not expected")


def test_a_copy_of_the_tied_head_is_let_pass_but_no_head_is_made_up(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(23, 12)}))
    assert load_model(folder).head is None
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    edit_config(folder, tie_word_embeddings=False)
    assert_refused(folder, "1 missing ['lm_head.weight']")


def test_a_wrong_shape_names_both(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(12, 24)}))
    assert_refused(folder, f"{Q_PROJ} has shape (12, 24), config.json asks for (24, 12)")


def test_quantised_tensors_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(24, 12, dtype=torch.int8)}))
    assert_refused(folder, f"{Q_PROJ} is stored as torch.int8; quantised weights are not supported")


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    assert_refused(folder, WEIGHTS, "is not a whole safetensors file")


def test_pickles_are_never_read(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert_refused(folder, "must be safetensors", ".bin files are pickles, which moesys never reads")


def test_shards_load_and_a_missing_one_is_named(sharded: Path) -> None:
    assert load_model(sharded).config == make_decoder().config
    shard = sorted(sharded.glob("model-00002-of-*.safetensors"))[0]
    shard.unlink()
    assert_refused(sharded, f"{shard.name} is missing")


@pytest.mark.parametrize("name", ["../model/model.safetensors", "sub/model.safetensors", "/etc/passwd"])
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    (folder / hf.INDEX_NAME).write_text(json.dumps({"weight_map": {Q_PROJ: name}}))
    assert_refused(folder, f"names the file {name!r}; shards must lie in its own folder")


@pytest.mark.parametrize(
    ("contents", "word"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "must map tensors to files in a JSON object named weight_map"),
        ('{"weight_map": [1]}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
    ],
)
def test_a_malformed_index_is_refused(folder: Path, contents: str, word: str) -> None:
    (folder / hf.INDEX_NAME).write_text(contents)
    assert_refused(folder, hf.INDEX_NAME, word)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    name = sorted(load_file(first))[0]
    save_file(tensors | {name: torch.zeros(1)}, second)
    assert_refused(sharded, f"holds tensors that another shard holds too: ['{name}']")


def test_float16_is_read_as_float32(folder: Path) -> None:
    edit_config(folder, dtype="float16")
    edit_tensors(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.embedding.weight, make_decoder().embedding.weight.half().float())


def test_shards_are_no_larger_than_asked_unless_a_tensor_is(sharded: Path) -> None:
    index = json.loads((sharded / hf.INDEX_NAME).read_text())
    sizes = []
    for path in sharded.glob("*.safetensors"):
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    assert max(sizes) <= 2000
    assert sum(sizes) == index["metadata"]["total_size"]
