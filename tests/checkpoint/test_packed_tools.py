"""What else takes a model folder takes a packed file: tokenizer, templates, inventory, and the look for NaN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from family_keys import FAMILY_KEYS
from model_folders import write_model
from moesys.checkpoint import Part, save_model
from moesys.checkpoint.hf import load_model as load_folder
from moesys.checkpoint.inventory import read_inventory
from moesys.checkpoint.layout import read_layout
from moesys.checkpoint.load import load_model
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packing import pack_model
from moesys.checkpoint.text_model import load_text_model, read_chat_templates, read_text_tools
from moesys.checkpoint.verification import compare_weights
from moesys.checkpoint.weight_check import check_weights
from moesys.data import train_tokenizer
from moesys.errors import DataError, ModelFormatError, SectionReadError
from moesys.kernels import Int8Product, Int8Weight
from moesys.models import Decoder, choose_family
from moesys.moe import ExpertBank, MoELayer
from moesys.moe.source import quantize_bank

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def write_text_model(folder: Path, **keys: object) -> Path:
    write_model(folder, FAMILY_KEYS["mixtral"] | {"vocab_size": 300} | keys)
    tokenizer = train_tokenizer(["to be or not to be"] * 3, 270).with_chat_template(TEMPLATE)
    tokenizer.save(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    return folder


def test_text_tools_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = write_text_model(tmp_path / "model")
    pack_model(folder, tmp_path / "file", form=PackedForm.INT8)
    one, other = read_text_tools(folder), read_text_tools(tmp_path / "file")
    assert other.stop_ids == one.stop_ids == {0, 3, 5}
    assert other.tokenizer.fingerprint == one.tokenizer.fingerprint
    assert other.tokenizer.render_files() == one.tokenizer.render_files()
    assert read_chat_templates(tmp_path / "file").texts == read_chat_templates(folder).texts
    assert read_chat_templates(folder).texts == {"default": TEMPLATE, "tool_use": "tools"}
    loaded = load_text_model(tmp_path / "file", product=Int8Product.W8A8)
    weight = loaded.decoder.head_weight_VD
    assert isinstance(weight, Int8Weight)
    assert weight.product is Int8Product.W8A8
    assert loaded.stop_ids == one.stop_ids


def test_stop_ids_come_from_the_config_where_nothing_else_names_any(tmp_path: Path) -> None:
    folder = write_text_model(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 7}))
    pack_model(folder, tmp_path / "file")
    assert read_text_tools(tmp_path / "file").stop_ids == {0, 7}
    (folder / "generation_config.json").write_text("[]")
    pack_model(folder, tmp_path / "file", overwrites=True)
    with pytest.raises(ModelFormatError, match=r"generation_config\.json in .*file must hold a JSON object"):
        read_text_tools(tmp_path / "file")


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    pack_model(tmp_path / "model", tmp_path / "file")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json: .* pack it again"):
        read_text_tools(tmp_path / "file")
    assert read_chat_templates(tmp_path / "file").texts == {}


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    pack_model(write_text_model(tmp_path / "model", vocab_size=64), tmp_path / "file")
    with pytest.raises(ModelFormatError, match="they do not belong together"):
        load_text_model(tmp_path / "file")


def test_the_layout_is_that_of_the_folder(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["deepseek_v3"])
    pack_model(tmp_path / "model", tmp_path / "file")
    one, other = read_layout(tmp_path / "model"), read_layout(tmp_path / "file")
    assert (one.family, one.decoder) == (other.family, other.decoder)
    assert one.keys == other.keys


def count_bytes(model: Decoder) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("form", PackedForm)
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "granitemoe", "llama"])
def test_an_inventory_counts_what_is_loaded(name: str, form: PackedForm, tmp_path: Path) -> None:
    written = write_model(tmp_path / "model", FAMILY_KEYS[name], torch.bfloat16)
    packed = pack_model(tmp_path / "model", tmp_path / "file", form=form)
    inventory = read_inventory(tmp_path / "file")
    assert (inventory.num_files, inventory.obstacle) == (1, None)
    model = inventory.model
    assert model is not None
    assert model.family.model_type == name
    assert model.total.num_parameters == written.count_parameters()
    assert model.total.stored_bytes == packed.num_weight_bytes == sum(model.formats.values())
    assert model.total.loaded_bytes == count_bytes(load_model(tmp_path / "file"))
    assert ("int8" in model.formats) == (form is PackedForm.INT8)
    assert {part.part: part.num_bytes for part in packed.parts} == {
        part: size.stored_bytes for part, size in model.parts.items()
    }
    own = read_inventory(tmp_path / "model").model
    assert own is not None
    assert own.num_active_parameters == model.num_active_parameters
    if form is PackedForm.FLOAT:
        assert model.total.loaded_bytes == own.total.loaded_bytes
        assert [layer.each.loaded_bytes for layer in model.experts] == [
            layer.each.loaded_bytes for layer in own.experts
        ]


def test_an_inventory_of_another_dtype_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"], torch.bfloat16)
    pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    with pytest.raises(ModelFormatError, match=r"packed to be computed in torch\.bfloat16"):
        read_inventory(tmp_path / "file", torch.float32)
    inventory = read_inventory(tmp_path / "file", torch.bfloat16)
    assert inventory.model is not None
    assert inventory.model.parts[Part.EXPERTS].loaded_bytes > 0


def test_weights_that_are_no_numbers_are_found(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.block_sparse_moe.experts.3.w1.weight"][2, :3] = float("nan")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, weights)
    pack_model(tmp_path / "model", tmp_path / "file")
    steps: list[tuple[int, int]] = []
    found = check_weights(tmp_path / "file", lambda done, total: steps.append((done, total)))
    assert [(f.name, f.num_nan, f.num_inf) for f in found.found] == [
        ("layer 1, expert 3", 3, 0),
        ("final_norm.weight", 0, 1),
    ]
    assert found.num_bytes == count_bytes(load_folder(tmp_path / "model")) == steps[-1][0] == steps[-1][1]


def test_a_check_finds_damage(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    assert check_weights(tmp_path / "file").found == ()
    contents = bytearray((tmp_path / "file").read_bytes())
    start = 8 + int.from_bytes(contents[:8], "little")
    contents[start + 100] ^= 16
    (tmp_path / "file").write_bytes(contents)
    with pytest.raises(SectionReadError, match=r"layer 0, expert 0 .*checksum"):
        check_weights(tmp_path / "file")


def test_a_check_finds_a_damaged_tokenizer(tmp_path: Path) -> None:
    pack_model(write_text_model(tmp_path / "model"), tmp_path / "file")
    assert check_weights(tmp_path / "file").found == ()
    contents = (tmp_path / "file").read_bytes()
    tokenizer = (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert contents.count(tokenizer) == 1
    damaged = bytearray(contents)
    damaged[contents.index(tokenizer) + 20] ^= 16
    (tmp_path / "file").write_bytes(damaged)
    with pytest.raises(ModelFormatError, match=r"files/tokenizer\.json in .* differs from its checksum"):
        check_weights(tmp_path / "file")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_int8_weights_are_not_exported(name: str, tmp_path: Path) -> None:
    """Buffers are no parameters: without the refusal a folder without matrices would be written."""
    write_model(tmp_path / "model", FAMILY_KEYS[name])
    pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    model = load_model(tmp_path / "file")
    (tmp_path / "written").mkdir()
    message = (
        r"blocks\.0\.mixer\.qkv_proj holds int8 weights, .* take the model folder that these were packed from"
    )
    with pytest.raises(ModelFormatError, match=message):
        save_model(model, tmp_path / "written", torch.bfloat16, {})
    assert list((tmp_path / "written").iterdir()) == []
    with pytest.raises(ModelFormatError, match=message):
        compare_weights(model, choose_family(model.config), tmp_path / "model", torch.float32)


def test_int8_experts_are_not_exported(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    model = load_model(tmp_path / "model")
    layer = model.get_submodule("blocks.1.feed_forward")
    assert isinstance(layer, MoELayer)
    assert isinstance(layer.experts, ExpertBank)
    layer.experts = quantize_bank(layer.experts)
    (tmp_path / "written").mkdir()
    with pytest.raises(ModelFormatError, match=r"blocks\.1\.feed_forward\.experts holds int8 weights"):
        save_model(model, tmp_path / "written", torch.float32, {})
