"""Law 4 for files: what is written here loads there, and every layout and older key of transformers loads here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from oracle import Checkpoint, assert_same, compute_logits, load_theirs, make_tokens
from safetensors.torch import load_file, save_file

from family_keys import FAMILY_KEYS, VARIANT_KEYS
from moesys.checkpoint import load_model, save_model
from moesys.errors import ModelFormatError
from moesys.models import FAMILIES, REFUSED, Decoder, Family

every_family = pytest.mark.parametrize("checkpoint", FAMILY_KEYS, indirect=True)
every_variant = pytest.mark.parametrize("checkpoint", VARIANT_KEYS, indirect=True)
TOKENS = make_tokens(length=20)


def find_family(model_type: str) -> Family:
    return next(family for family in FAMILIES if family.model_type == model_type)


def assert_same_weights(found: Decoder, expected: Decoder) -> None:
    assert found.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@every_variant
@torch.no_grad()
def test_what_is_written_here_loads_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    family = find_family(checkpoint.theirs.config.model_type)
    save_model(checkpoint.ours, tmp_path, torch.float32, {}, family=family)
    assert_same(compute_logits(checkpoint.ours, TOKENS), load_theirs(tmp_path)(TOKENS).logits)
    assert_same_weights(load_model(tmp_path), checkpoint.ours)


@every_family
@torch.no_grad()
def test_shards_that_are_written_here_load_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    exported = save_model(checkpoint.ours, tmp_path, torch.float32, {}, max_shard_bytes=20_000)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert sorted(exported.files) == files
    assert "model.safetensors.index.json" in files
    assert_same(compute_logits(checkpoint.ours, TOKENS), load_theirs(tmp_path)(TOKENS).logits)
    assert_same_weights(load_model(tmp_path), checkpoint.ours)


@every_family
@torch.no_grad()
def test_what_is_written_in_bfloat16_loads_there_with_the_same_bits(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    save_model(checkpoint.ours, tmp_path, torch.bfloat16, {})
    again = load_model(tmp_path, torch.float32)
    assert_same(compute_logits(again, TOKENS), load_theirs(tmp_path)(TOKENS).logits)


def make_layout_cases() -> list[Any]:
    return [
        pytest.param(family.model_type, number, id=f"{family.model_type}-{number}")
        for family in FAMILIES
        for number, layout in enumerate(family.layout.moe)
        if getattr(layout.experts, "encoding", "plain") == "plain"
    ]


@pytest.mark.parametrize(("model_type", "number"), make_layout_cases())
@torch.no_grad()
def test_every_layout_of_experts_is_what_transformers_reads_so(
    model_type: str, number: int, open_checkpoint: Any, tmp_path: Path
) -> None:
    """A family writes its first layout; put first, each of the others loads in transformers too."""
    ours = open_checkpoint(model_type).ours
    family = find_family(model_type)
    layout = replace(family.layout, moe=(family.layout.moe[number],))
    save_model(ours, tmp_path, torch.float32, {}, family=replace(family, layout=layout))
    assert_same(compute_logits(ours, TOKENS), load_theirs(tmp_path)(TOKENS).logits)
    assert_same_weights(load_model(tmp_path), ours)


@every_family
def test_transformers_own_names_are_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Experts stacked, as they lie in its memory."""
    checkpoint.theirs.save_pretrained(tmp_path, save_original_format=False)
    assert_same_weights(load_model(tmp_path), checkpoint.ours)


@every_family
@pytest.mark.parametrize("max_shard_bytes", [2**31, 20_000])
def test_shards_are_read(checkpoint: Checkpoint, tmp_path: Path, max_shard_bytes: int) -> None:
    checkpoint.theirs.save_pretrained(tmp_path, max_shard_size=max_shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_bytes > 20_000)
    assert_same_weights(load_model(tmp_path), checkpoint.ours)


def edit_config(folder: Path, **changes: Any) -> None:
    """``...`` takes a key away."""
    keys = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in keys.items() if v is not ...}))


@every_variant
def test_the_keys_of_older_files_are_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.theirs.save_pretrained(tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    changes = {"dtype": ..., "torch_dtype": "float32", "rope_parameters": ..., "rope_theta": theta}
    if "partial_rotary_factor" in rope:
        changes["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    changes["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    edit_config(tmp_path, **changes)
    assert_same_weights(load_model(tmp_path), checkpoint.ours)


def test_kimi_k2_is_read_and_written_as_what_transformers_knows(open_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint("deepseek_v3")
    checkpoint.theirs.save_pretrained(tmp_path / "kimi")
    edit_config(tmp_path / "kimi", model_type="kimi_k2", architectures=["DeepseekV3ForCausalLM"])
    ours = load_model(tmp_path / "kimi")
    assert_same_weights(ours, checkpoint.ours)
    (tmp_path / "written").mkdir()
    save_model(ours, tmp_path / "written", torch.float32, {})
    assert_same(compute_logits(ours, TOKENS), load_theirs(tmp_path / "written")(TOKENS).logits)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_are_left_out(
    model_type: str, open_checkpoint: Any, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(model_type)
    checkpoint.theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    further = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    tensors |= {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in further.items()}
    for name in ("enorm", "eh_proj", "shared_head.norm"):
        tensors[f"model.layers.2.{name}.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load_model(tmp_path), checkpoint.ours)


def test_a_tied_head_that_is_stored_too_is_the_embedding(open_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint("granitemoe")
    checkpoint.theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(load_model(tmp_path), checkpoint.ours)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
            "'dynamic'",
        ),
        ("minimax", {}, "lightning attention"),
        ("qwen3_next", {}, "gated delta rule"),
        ("glm4_moe_lite", {}, "no description"),
        ("granitemoeshared", {}, "no description"),
    ],
)
def test_what_has_other_arithmetic_is_refused_by_name(
    model_type: str, changes: dict[str, Any], reason: str, open_checkpoint: Any, tmp_path: Path
) -> None:
    open_checkpoint("llama").theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, model_type=model_type, **changes)
    with pytest.raises(ModelFormatError, match=reason) as caught:
        load_model(tmp_path)
    assert model_type == "llama" or model_type in str(caught.value)


def test_refused_types_are_known_to_transformers_and_not_to_us() -> None:
    """All but those that only their authors' own code runs."""
    assert not REFUSED.keys() & {name for family in FAMILIES for name in family.model_types}
    assert REFUSED.keys() - {"kimi_k25", "kimi_linear"} <= set(transformers.CONFIG_MAPPING)
