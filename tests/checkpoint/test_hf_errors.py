"""Model folders that cannot be loaded say what is wrong and what to do; nothing outside the folder is read."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesys.checkpoint import load_model, save_model
from moesys.checkpoint.model_files import INDEX_NAME
from moesys.errors import ModelFormatError
from moesys.models import (
    FAMILIES,
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
HEAD = "lm_head.weight"
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
def sharded(tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    path.mkdir()
    save_model(make_decoder(), path, torch.float32, {}, max_shard_bytes=2000)
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
    total = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    assert seen[-1] == (total, total)
    assert all(before < after for (before, _), (after, _) in itertools.pairwise(seen))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_is_no_model_folder(folder: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", "is not a folder; give the folder of a Hugging Face checkpoint")
    assert_refused(folder / WEIGHTS, "is no packed file of moesys; give the folder of a model")
    (folder / "config.json").unlink()
    assert_refused(folder, "has no config.json")


def test_a_run_must_be_exported_first(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    assert_refused(tmp_path, "is a training run; export it first: moesys export", "--to DIR")


@pytest.mark.parametrize(
    ("contents", "word"),
    [
        (b"{", "must hold a JSON object"),
        (b"\xff", "must hold a JSON object"),
        (b"[1]", "its JSON is not an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": {"b": 1, "b": 1}}', "its JSON has the name 'b' twice"),
    ],
)
def test_a_config_that_is_no_object(folder: Path, contents: bytes, word: str) -> None:
    (folder / "config.json").write_bytes(contents)
    assert_refused(folder, "config.json", word)


def test_an_unknown_family_names_those_that_are_known(folder: Path) -> None:
    edit_config(folder, model_type="qwen4_moe")
    assert_refused(folder, "'qwen4_moe' is not supported", "qwen3_moe, mixtral", "the nearest is 'qwen3_moe'")
    edit_config(folder, model_type="gpt2")
    assert_refused(folder, "'gpt2' is not supported (supported: qwen3_moe, mixtral, ")
    edit_config(folder, model_type=KeyError)
    assert_refused(folder, "model_type '' is not supported")


def test_code_of_a_checkpoint_is_never_run_and_that_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')")
    load_model(folder)
    assert caplog.records == []
    edit_config(folder, auto_map=code)
    assert load_model(folder).config == make_decoder().config
    [record] = caplog.records
    assert (record.name, record.levelname) == ("moesys", "WARNING")
    assert "'modeling_evil.EvilForCausalLM'" in record.message
    assert "which is ignored: moesys never runs it, and computes qwen3_moe by its own" in record.message
    edit_config(folder, model_type="evil")
    assert_refused(
        folder, "'evil' is not supported", "auto_map asks for code of the checkpoint", "never runs"
    )


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_quantisation_that_says_nothing_is_none(folder: Path, nothing: object) -> None:
    edit_config(folder, quantization_config=nothing)
    assert load_model(folder).config == make_decoder().config


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "bitsandbytes"])
def test_quantisations_that_are_not_decoded_are_refused_by_name(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    assert_refused(folder, f"quant_method '{method}'", "supported: fp8", "mxfp4", "give unquantised weights")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ["rope_type 'dynamic'"]),
        ({"rope_parameters": {"type": "linear", "rope_theta": 1e4}}, ["needs the key 'factor'"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "only 'silu' is"]),
        ({"quantization_config": {"bits": 4}}, ["names no quant_method", "supported: fp8"]),
        ({"quantization_config": "fp8"}, ["names no quant_method"]),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, ["fmt 'e5m2'", "'e4m3'"]),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
            ["weight_block_size must be two whole numbers above 0 or null, got [128, 0]"],
        ),
        ({"dtype": "float64"}, ["dtype 'float64'", "supported: float32, bfloat16, float16"]),
        ({"dtype": ["float32"]}, ["dtype ['float32']"]),
        ({"hidden_size": KeyError}, ["lacks the key 'hidden_size' that a qwen3_moe needs"]),
        ({"num_attention_heads": 0, "head_dim": None}, ["config.json holds a value that no qwen3_moe has"]),
        ({"num_key_value_heads": -1}, ["num_kv_heads is -1, not above zero"]),
        ({"hidden_size": 10**30}, ["config.json describes no model"]),
        ({"num_hidden_layers": "two"}, ["config.json holds a value that no qwen3_moe has"]),
        ({"decoder_sparse_step": 0}, ["config.json holds a value that no qwen3_moe has"]),
    ],
)
def test_configs_that_cannot_be_read(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_config(folder, **changes)
    assert_refused(folder, *words)


def test_missing_and_unexpected_tensors_are_all_told(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"strange": torch.zeros(1)}))
    assert_refused(
        folder, "do not fit its config.json (qwen3_moe; 0 missing, 1 not expected", "not expected: strange"
    )
    edit_tensors(folder, lambda tensors: tensors.pop(Q_PROJ))
    assert_refused(folder, "1 missing, 1 not expected", f"missing: {Q_PROJ} (24, 12)")


def test_what_is_missing_of_many_experts_is_one_line(folder: Path) -> None:
    names = [name for name in load_file(folder / WEIGHTS) if ".experts." in name and "up_proj" in name]
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in names])
    assert_refused(folder, "missing: model.layers.0.mlp.experts.{0-3}.up_proj.weight (6, 12) (4 tensors)")


def test_tensors_that_are_computed_are_let_pass(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    assert load_model(folder).config == make_decoder().config


def test_a_copy_of_the_tied_head_stays_tied(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"].clone()}))
    assert load_model(folder).head is None


def test_a_head_that_differs_from_the_embedding_is_used(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: torch.ones(23, 12)}))
    model = load_model(folder)
    assert torch.equal(model.head_weight_VD, torch.ones(23, 12))
    assert "the files hold another one, which is used" in caplog.text


def test_a_head_of_another_shape_is_not_the_embedding(folder: Path) -> None:
    zeros = {HEAD: torch.zeros(12, 23), "model.embed_tokens.weight": torch.zeros(23, 12)}
    edit_tensors(folder, lambda tensors: tensors.update(zeros))
    assert_refused(folder, f"{HEAD} has shape (12, 23), config.json asks for (23, 12)")


def test_a_head_without_an_embedding_is_both_where_they_are_tied(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors.pop("model.embed_tokens.weight")}))
    assert torch.equal(load_model(folder).embedding.weight, make_decoder().embedding.weight)


def test_no_head_is_made_up(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    assert_refused(folder, "1 missing", f"missing: {HEAD} (23, 12)")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("num_hidden_layers", ["asks for 1000000000 layers, the files hold no more than"]),
        ("vocab_size", ["weights, the files in", "they do not belong together"]),
        ("moe_intermediate_size", ["weights, the files in"]),
        ("num_experts", ["weights, the files in"]),
    ],
)
def test_sizes_beyond_the_files_are_refused_before_anything_is_built(
    folder: Path, key: str, words: list[str]
) -> None:
    edit_config(folder, **{key: 10**9})
    assert_refused(folder, *words)


def test_a_wrong_shape_names_both(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(12, 24)}))
    assert_refused(folder, f"{Q_PROJ} has shape (12, 24), config.json asks for (24, 12)")


def test_tensors_that_nothing_says_how_to_decode_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(24, 12, dtype=torch.int8)}))
    assert_refused(folder, f"{Q_PROJ} is stored as I8, of which config.json says nothing that decodes it")
    edit_tensors(
        folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(24, 12, dtype=torch.float8_e4m3fn)})
    )
    assert_refused(folder, f"{Q_PROJ} is stored as F8_E4M3, of which config.json says nothing")


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
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {Q_PROJ: name}}))
    assert_refused(folder, f"names the file {name!r}; shards must lie in its own folder")


@pytest.mark.parametrize(
    ("contents", "word"),
    [
        ("{", "must hold a JSON object"),
        ("[]", "must hold a JSON object"),
        ('{"weight_map": {}}', "must map tensors to files"),
        ("{}", "must map tensors to files in a JSON object named weight_map"),
        ('{"weight_map": [1]}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
    ],
)
def test_a_malformed_index_is_refused(folder: Path, contents: str, word: str) -> None:
    (folder / INDEX_NAME).write_text(contents)
    assert_refused(folder, INDEX_NAME, word)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = sorted(load_file(first))[0]
    save_file(load_file(second) | {name: torch.zeros(1)}, second)
    assert_refused(sharded, f"{name} lies in both {first.name} and {second.name}")


def edit_index(folder: Path, name: str, file_name: str) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"][name] = file_name
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_an_index_must_agree_with_its_shards(sharded: Path) -> None:
    first, second = sorted(path.name for path in sharded.glob("*.safetensors"))[:2]
    name = sorted(load_file(sharded / first))[0]
    edit_index(sharded, name, second)
    assert_refused(sharded, f"says that {name} lies in {second}; it lies in {first}")
    edit_index(sharded, name, first)
    edit_index(sharded, "ghost", first)
    assert_refused(sharded, f"says that ghost lies in {first}; it lies in no other file")


def test_all_that_is_wrong_with_the_files_is_told_at_once(sharded: Path) -> None:
    first, second, third = sorted(sharded.glob("*.safetensors"))[:3]
    first.unlink()
    second.write_bytes(b"")
    third.unlink()
    os.mkfifo(third)
    assert_refused(
        sharded, f"{first.name} is missing", f"{second} is not a whole", f"{third.name} is missing"
    )


def test_one_file_beside_an_index_of_others_is_ambiguous(sharded: Path) -> None:
    save_file({"x": torch.zeros(1)}, sharded / WEIGHTS)
    assert_refused(sharded, "and an index of other files, and they may differ; remove one of the two")


def test_links_lead_to_the_files_as_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (folder / WEIGHTS).rename(tmp_path / "blobs" / "1f")
    (folder / WEIGHTS).symlink_to(tmp_path / "blobs" / "1f")
    assert load_model(folder).config == make_decoder().config


def test_float16_is_read_as_float32(folder: Path) -> None:
    edit_config(folder, dtype="float16")
    edit_tensors(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.embedding.weight, make_decoder().embedding.weight.half().float())


def test_a_layout_can_be_asked_for(tmp_path: Path) -> None:
    families = {family.model_type: family for family in FAMILIES}
    assert save_model(make_decoder(), tmp_path, torch.float32, {}).family.model_type == "qwen3_moe"
    with pytest.raises(ModelFormatError, match="the layout mixtral does not hold this model"):
        save_model(make_decoder(), tmp_path, torch.float32, {}, family=families["mixtral"])


def test_shards_are_no_larger_than_asked_unless_a_tensor_is(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    sizes = []
    for path in sharded.glob("*.safetensors"):
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    assert max(sizes) <= 2000
    assert sum(sizes) == index["metadata"]["total_size"]
