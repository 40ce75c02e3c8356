"""A model folder written anew is the same model, whatever its layout, dtype and shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from family_keys import FAMILY_KEYS
from model_folders import write_model
from moesys.checkpoint import (
    FileSystem,
    StorageForm,
    convert_model,
    load_model,
    save_model,
    stored_chunks,
    verification,
    verify_export,
)
from moesys.checkpoint.verification import compute_prompt_logits
from moesys.errors import CheckpointError, ConfigError, ModelFormatError
from moesys.models import FAMILIES, ExpertStorage

WEIGHTS = "model.safetensors"
TWO_STORAGES = [f.model_type for f in FAMILIES if len({m.experts.storage for m in f.layout.moe}) == 2]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = read_tensors(one), read_tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", [family.model_type for family in FAMILIES])
def test_the_copy_is_the_source(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = write_model(source, FAMILY_KEYS[name])
    converted = convert_model(source, tmp_path / "copy", verify=True)
    assert_same_tensors(source, tmp_path / "copy")
    assert (source / "config.json").read_bytes() == (tmp_path / "copy" / "config.json").read_bytes()
    assert (converted.family, converted.num_parameters) == (name, model.count_parameters())
    assert converted.verification is not None
    assert converted.verification.logit_difference == 0
    assert converted.verification.largest_logit > 0
    assert converted.num_bytes == sum(path.stat().st_size for path in (tmp_path / "copy").iterdir())


@pytest.mark.parametrize("name", TWO_STORAGES)
def test_experts_are_stacked_and_separated_again(name: str, tmp_path: Path) -> None:
    source, stacked, separate = tmp_path / "source", tmp_path / "stacked", tmp_path / "separate"
    write_model(source, FAMILY_KEYS[name])
    convert_model(source, stacked, form=StorageForm(experts=ExpertStorage.STACKED), verify=True)
    assert any(name.endswith("experts.gate_up_proj") for name in read_tensors(stacked))
    assert not any(".experts.0." in name for name in read_tensors(stacked))
    convert_model(stacked, separate, form=StorageForm(experts=ExpertStorage.SEPARATE), verify=True)
    assert_same_tensors(source, separate)


def test_bfloat16_is_the_sources_rounded_once(tmp_path: Path) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS["olmoe"])
    converted = convert_model(tmp_path / "source", tmp_path / "copy", torch.bfloat16, verify=True)
    source, copy = read_tensors(tmp_path / "source"), read_tensors(tmp_path / "copy")
    assert all(torch.equal(copy[name], tensor.bfloat16()) for name, tensor in source.items())
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == "bfloat16"
    difference = compute_prompt_logits(load_model(tmp_path / "source")) - compute_prompt_logits(
        load_model(tmp_path / "copy")
    )
    assert converted.verification is not None
    assert converted.verification.logit_difference == difference.abs().max().item() > 0


def test_shards_are_no_larger_than_asked(tmp_path: Path) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS["mixtral"])
    convert_model(
        tmp_path / "source", tmp_path / "copy", form=StorageForm(max_shard_bytes=20_000), verify=True
    )
    shards = sorted((tmp_path / "copy").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= 20_000 for path in shards)
    assert_same_tensors(tmp_path / "source", tmp_path / "copy")


def test_what_belongs_to_a_model_comes_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None, "router_aux_loss_coef": 0.02}
    write_model(source, FAMILY_KEYS["qwen3_moe"], **ids, transformers_version="4.0", auto_map={"x": "y"})
    kept = [
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE",
        "additional_chat_templates/tool_use.jinja"
    ]  # fmt: skip
    (source / "additional_chat_templates").mkdir()
    for name in [*kept, "modeling.py", "pytorch_model.bin", "README.md"]:
        (source / name).write_text(f"{name} as it was")
    convert_model(source, tmp_path / "copy")
    copied = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*")}
    assert copied | {"LICENSE"} == {*kept, "config.json", WEIGHTS}
    assert all((tmp_path / "copy" / name).read_text() == f"{name} as it was" for name in kept)
    keys = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert {name: keys[name] for name in ids} == ids
    assert not {"transformers_version", "auto_map"} & keys.keys()


def test_a_family_keeps_its_name_where_another_would_hold_the_model(tmp_path: Path) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS["mistral"] | {"sliding_window": None})
    assert convert_model(tmp_path / "source", tmp_path / "copy").family == "mistral"


@pytest.mark.parametrize(
    ("name", "storage", "reason"),
    [
        (
            "granitemoe",
            ExpertStorage.SEPARATE,
            "granitemoe has no layout with separate experts; it has stacked",
        ),
        ("llama", ExpertStorage.STACKED, "llama has no experts to store as stacked"),
    ],
)
def test_a_layout_that_a_family_has_not_is_refused(
    name: str, storage: ExpertStorage, reason: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS[name])
    with pytest.raises(ModelFormatError, match=reason):
        convert_model(tmp_path / "source", tmp_path / "copy", form=StorageForm(experts=storage))
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("place", ["source", "source/copy", "full"])
def test_only_a_new_or_empty_folder_elsewhere_is_written(place: str, tmp_path: Path) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS["llama"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="give another one with --to"):
        convert_model(tmp_path / "source", tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS["llama"])
    (tmp_path / "copy").mkdir()
    convert_model(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy" / WEIGHTS).exists()


def test_nothing_is_left_where_verifying_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS["llama"])

    def save_another(model: Any, *arguments: Any, **options: Any) -> Any:
        model.final_norm.weight[3] += 1
        exported = save_model(model, *arguments, **options)
        model.final_norm.weight[3] -= 1
        return exported

    monkeypatch.setattr("moesys.checkpoint.convert.save_model", save_another)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight differs"):
        convert_model(tmp_path / "source", tmp_path / "copy", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_verifying_compares_names_shapes_dtypes_and_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    family = next(family for family in FAMILIES if family.model_type == "mixtral")
    verified = verify_export(model, family, tmp_path / "model", torch.float32)
    assert (verified.num_tensors, verified.logit_difference) == (len(read_tensors(tmp_path / "model")), 0)
    assert "equal bit for bit" in verified.describe()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        verify_export(model, family, tmp_path / "model", torch.bfloat16)
    stacked = family.with_experts(ExpertStorage.STACKED)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight was not to be written"):
        verification.compare_weights(model, stacked, tmp_path / "model", torch.float32)
    path = tmp_path / "model" / WEIGHTS
    contents = bytearray(path.read_bytes())
    monkeypatch.setattr(stored_chunks, "_CHUNK_ELEMENTS", 16)
    assert verification.compare_weights(model, family, tmp_path / "model", torch.float32)
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match="differs"):
        verify_export(model, family, tmp_path / "model", torch.float32)
    contents[-1] ^= 1
    tensors = load(bytes(contents))
    head = tensors["lm_head.weight"]
    for same_bytes in (head.view(32, 64), head.view(torch.int32)):
        save_file({**tensors, "lm_head.weight": same_bytes}, path)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
            verification.compare_weights(model, family, tmp_path / "model", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_tensors_under_another_config_do_not_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS["llama"])

    def save_another_epsilon(model: Any, folder: Path, *arguments: Any, **options: Any) -> Any:
        exported = save_model(model, folder, *arguments, **options)
        keys = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(keys | {"rms_norm_eps": 2 * keys["rms_norm_eps"] + 1e-3})
        )
        return exported

    monkeypatch.setattr("moesys.checkpoint.convert.save_model", save_another_epsilon)
    with pytest.raises(
        CheckpointError, match=r"logits of a prompt differ, .* its config\.json describes another"
    ):
        convert_model(tmp_path / "source", tmp_path / "copy", dtype, verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_logits_that_are_not_numbers_do_not_verify(tmp_path: Path) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS["llama"])
    path = tmp_path / "source" / WEIGHTS
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"nothing can be verified.* 1024 of 1024 are NaN or infinite"):
        convert_model(tmp_path / "source", tmp_path / "copy", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_a_dtype_does_to_the_logits_is_bounded(tmp_path: Path) -> None:
    expected = compute_prompt_logits(write_model(tmp_path / "model", FAMILY_KEYS["llama"]))
    verified = verification.compare_logits(expected, tmp_path / "model", 1, expected * 1.4)
    assert verified.logit_difference == pytest.approx(0.4 * expected.abs().max().item())
    assert "the change of dtype moves these logits" in verified.describe()
    with pytest.raises(CheckpointError, match=r"move by 0\.6 of their norm, more than 0\.5; .* write fp32"):
        verification.compare_logits(expected, tmp_path / "model", 1, expected * 2.5)
    with pytest.raises(CheckpointError, match="2 of 1024 are NaN or infinite"):
        verification.compare_logits(
            expected,
            tmp_path / "model",
            1,
            expected.index_fill(1, torch.tensor([3]), 1)
            .flatten()
            .index_fill(0, torch.tensor([5, 9]), torch.inf)
            .view_as(expected),
        )


def test_routers_rounded_or_kept_in_float32_verify_in_bfloat16(tmp_path: Path) -> None:
    for name in ("deepseek_v3", "phimoe", "gpt_oss"):
        write_model(tmp_path / name, FAMILY_KEYS[name])
        converted = convert_model(tmp_path / name, tmp_path / f"{name}-bf16", torch.bfloat16, verify=True)
        assert converted.verification is not None


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS["llama"])

    class FullDisk(FileSystem):
        def write_new_file(self, path: Path, *arguments: Any) -> Any:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        convert_model(tmp_path / "source", tmp_path / "copy", files=FullDisk())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_config_of_a_billion_layers_is_refused_at_once(tmp_path: Path) -> None:
    write_model(tmp_path / "source", FAMILY_KEYS["llama"])
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))
    with pytest.raises(ModelFormatError, match="no model has more than"):
        convert_model(tmp_path / "source", tmp_path / "copy")
