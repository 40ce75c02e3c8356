"""An inventory tells what the files hold and what loading would make of it, without reading a weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import DEEPSEEK, GPT_OSS

from family_keys import FAMILY_KEYS
from model_folders import write_model, write_sparse_model
from moesys.checkpoint import ModelInventory, Part, PartSize, load_model, read_inventory
from moesys.errors import ModelFormatError
from moesys.models import Decoder, ExpertStorage
from moesys.moe import MoELayer

WEIGHTS = "model.safetensors"


def read_model(folder: Path, dtype: torch.dtype | None = None) -> ModelInventory:
    inventory = read_inventory(folder, dtype)
    assert inventory.obstacle is None
    assert inventory.model is not None
    return inventory.model


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def count_bytes(model: Decoder) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", FAMILY_KEYS)
def test_every_weight_is_in_one_part(name: str, tmp_path: Path) -> None:
    written = write_model(tmp_path / "model", FAMILY_KEYS[name], torch.bfloat16)
    found = read_model(tmp_path / "model")
    total = found.total
    assert total.num_parameters == written.count_parameters()
    assert total.stored_bytes == sum(t.nbytes for t in load_file(tmp_path / "model" / WEIGHTS).values())
    assert total.loaded_bytes == count_bytes(load_model(tmp_path / "model"))
    assert found.unused_bytes == 0
    assert all(size.num_parameters and size.stored_bytes for size in found.parts.values())


@pytest.mark.parametrize("storage", ExpertStorage)
def test_parts_are_what_they_are_called(storage: ExpertStorage, tmp_path: Path) -> None:
    keys = FAMILY_KEYS["qwen2_moe"] | {"num_hidden_layers": 3, "mlp_only_layers": [1]}
    model = write_model(tmp_path / "model", keys, experts=storage)
    found = read_model(tmp_path / "model")
    layers = [block.feed_forward for block in model.blocks]
    moe = [layer for layer in layers if isinstance(layer, MoELayer)]
    dense = [layer for layer in layers if not isinstance(layer, MoELayer)]
    expected = {
        Part.EMBEDDING: [model.embedding],
        Part.ATTENTION: [block.mixer for block in model.blocks],
        Part.DENSE: dense,
        Part.SHARED: [m for layer in moe for m in (layer.shared_expert, layer.shared_expert_gate)],
        Part.ROUTER: [layer.router for layer in moe],
        Part.NORM: [
            model.final_norm, *(n for block in model.blocks for n in (block.input_norm, block.post_mixer_norm))
        ],
        Part.HEAD: [model.head],
        Part.EXPERTS: [layer.experts for layer in moe],
    }  # fmt: skip
    sizes = {
        part: sum(weight.numel() for module in modules for weight in module.parameters())
        for part, modules in expected.items()
    }
    assert found.parts == {part: PartSize(size, 4 * size, 4 * size) for part, size in sizes.items()}
    assert [(e.layer_id, e.num_experts, e.top_k) for e in found.experts] == [(0, 6, 2), (2, 6, 2)]
    one = sizes[Part.EXPERTS] // 12
    assert {e.each for e in found.experts} == {PartSize(one, 4 * one, 4 * one)}
    assert found.num_active_parameters == model.count_parameters() - 2 * 4 * one


def test_memory_is_that_of_the_dtype_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"], torch.bfloat16)
    found = read_model(tmp_path / "model", torch.float32)
    assert found.total.loaded_bytes == count_bytes(load_model(tmp_path / "model", torch.float32))
    assert found.parts[Part.ROUTER] == read_model(tmp_path / "model").parts[Part.ROUTER]


@pytest.mark.parametrize("source", ["fp8", "mxfp4"])
def test_quantised_weights_count_as_they_are_stored(source: str, tmp_path: Path) -> None:
    folder = write_quantised(tmp_path / source, source)
    inventory, found = read_inventory(folder), read_model(folder)
    assert set(found.formats) == {source, "fp32"}
    assert sum(found.formats.values()) == inventory.stored_bytes == found.total.stored_bytes
    tensors = load_file(folder / WEIGHTS)
    marks = ("_scale_inv", "_blocks", "_scales")
    quantised = [t for n, t in tensors.items() if n.endswith(marks) or t.dtype == torch.float8_e4m3fn]
    assert found.formats[source] == sum(tensor.nbytes for tensor in quantised)
    assert found.total.loaded_bytes == count_bytes(load_model(folder)) > inventory.stored_bytes


def write_quantised(folder: Path, source: str) -> Path:
    """Writes experts as zeros in a quantised format."""
    write_model(folder, GPT_OSS if source == "mxfp4" else DEEPSEEK)
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if ".experts." in name and "bias" not in name]:
        tensor = tensors.pop(name)
        if source == "mxfp4":
            rows = tensor.shape[0], tensor.shape[2], tensor.shape[1] // 32
            tensors[f"{name}_blocks"] = torch.zeros(*rows, 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.zeros(rows, dtype=torch.uint8)
        else:
            tensors[name] = torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.zeros([-(-size // 16) for size in tensor.shape])
    save_file(tensors, folder / WEIGHTS)
    blocks = {} if source == "mxfp4" else {"weight_block_size": [16, 16]}
    change_config(folder, quantization_config={"quant_method": source, **blocks})
    return folder


def test_layers_behind_the_last_are_not_used(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["deepseek_v3"])
    path = tmp_path / "model" / WEIGHTS
    save_file({**load_file(path), "model.layers.2.eh_proj.weight": torch.ones(32)}, path)
    found = read_model(tmp_path / "model")
    assert found.unused_bytes == 128
    assert found.total.stored_bytes == read_inventory(tmp_path / "model").stored_bytes - 128


def test_a_head_beside_a_tied_embedding_is_a_copy_of_it(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["llama"] | {"tie_word_embeddings": True})
    path = tmp_path / "model" / WEIGHTS
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, path)
    assert read_model(tmp_path / "model").unused_bytes == head.nbytes
    del tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head}, path)
    assert read_model(tmp_path / "model").parts[Part.EMBEDDING].stored_bytes == head.nbytes


def test_an_unknown_family_still_has_files(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    change_config(tmp_path / "model", model_type="mixtrall")
    inventory = read_inventory(tmp_path / "model")
    assert inventory.model is None
    assert inventory.obstacle is not None
    assert "'mixtrall' is not supported" in inventory.obstacle
    assert "the nearest is 'mixtral'" in inventory.obstacle
    assert inventory.dtypes == {"F32": inventory.stored_bytes}
    assert inventory.num_tensors == len(load_file(tmp_path / "model" / WEIGHTS))


def test_a_refused_family_says_why(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    change_config(tmp_path / "model", model_type="qwen3_next")
    assert "a gated delta rule" in (read_inventory(tmp_path / "model").obstacle or "")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"num_attention_heads": 3}, "num_heads"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"vocab_size": -1}, "vocab_size is -1, not above zero"),
        ({"hidden_size": None}, "hidden_size is None, which must be set"),
    ],
)
def test_a_config_that_is_not_understood_is_told(
    keys: dict[str, object], reason: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    change_config(tmp_path / "model", **keys)
    inventory = read_inventory(tmp_path / "model")
    assert inventory.model is None
    assert reason in (inventory.obstacle or "")


def test_missing_tensors_are_told_beside_what_is_there(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    path = tmp_path / "model" / WEIGHTS
    tensors = load_file(path)
    lost = tensors.pop("model.norm.weight")
    save_file(tensors, path)
    inventory = read_inventory(tmp_path / "model")
    assert "model.norm.weight" in (inventory.obstacle or "")
    assert inventory.model is not None
    assert inventory.model.total.stored_bytes == inventory.stored_bytes
    assert inventory.model.total.loaded_bytes == inventory.stored_bytes + lost.nbytes


def test_a_damaged_header_is_an_error(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    (tmp_path / "model" / WEIGHTS).write_bytes(b"\xff" * 64)
    with pytest.raises(ModelFormatError, match="not a whole safetensors file"):
        read_inventory(tmp_path / "model")


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sparse_model(tmp_path / "model", FAMILY_KEYS["deepseek_v2"], num_shards=3)

    def refuse(*arguments: object) -> int:
        raise AssertionError("weights were read")

    monkeypatch.setattr("moesys.checkpoint.streaming.os.preadv", refuse)
    assert read_inventory(tmp_path / "model").num_files == 3
