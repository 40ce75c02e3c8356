"""A packed file is the model of its folder, in bits; of an int8 one, the model rounded in memory is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_models import compute_logits, quantize_in_memory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_checkpoints import (
    make_fp8,
    make_mxfp4,
    quantise_fp8,
    write_quantised,
)

from family_keys import FAMILY_KEYS, VARIANT_KEYS
from model_folders import write_model
from moesys.checkpoint.hf import load_model as load_folder
from moesys.checkpoint.load import load_model
from moesys.checkpoint.module_packer import PackedPart
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packing import PackedModel, pack_model
from moesys.checkpoint.parts import Part
from moesys.errors import ConfigError, IneffectiveOptionError, ModelFormatError
from moesys.kernels import Int8Product, Int8Weight, pack_int8
from moesys.models import FAMILIES, ExpertStorage
from moesys.moe import MoELayer, QuantizedBank

VARIANTS = [
    "deepseek_v2-groups",
    "granitemoe-biases-untied",
    "llama-llama3-biases",
    "mixtral-heads-from-the-width-tied",
    "qwen3_moe-every-other-layer-tied",
]
TWO_STORAGES = [f.model_type for f in FAMILIES if len({m.experts.storage for m in f.layout.moe}) == 2]


def get_part(packed: PackedModel, part: Part) -> PackedPart:
    return next(found for found in packed.parts if found.part is part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*FAMILY_KEYS, *VARIANTS])
def test_floats_are_packed_as_they_are(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    written = write_model(tmp_path / "model", VARIANT_KEYS[name], dtype)
    packed = pack_model(tmp_path / "model", tmp_path / "file")
    found, expected = load_model(tmp_path / "file"), load_folder(tmp_path / "model")
    named = dict(found.named_parameters()) | dict(found.named_buffers())
    for tensor_name, tensor in [*expected.named_parameters(), *expected.named_buffers()]:
        assert tensor.dtype == named[tensor_name].dtype
        assert torch.equal(tensor, named[tensor_name]), tensor_name
    assert torch.equal(compute_logits(found), compute_logits(expected))
    assert packed.num_parameters == written.count_parameters()
    assert packed.num_bytes == (tmp_path / "file").stat().st_size
    assert not packed.is_lossy


@pytest.mark.parametrize("product", Int8Product)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILY_KEYS)
def test_int8_is_the_model_rounded_in_memory(
    name: str, dtype: torch.dtype, product: Int8Product, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS[name], dtype)
    packed = pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    found = load_model(tmp_path / "file", product=product)
    expected = quantize_in_memory(load_folder(tmp_path / "model"), product)
    assert torch.equal(compute_logits(found), compute_logits(expected))
    assert packed.is_lossy
    layers = [b.feed_forward for b in found.blocks if isinstance(b.feed_forward, MoELayer)]
    assert all(isinstance(layer.experts, QuantizedBank) for layer in layers)
    assert found.head is None or isinstance(found.head_weight_VD, Int8Weight)
    assert found.embedding.weight.dtype == dtype


def test_what_is_rounded_and_what_stays(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["deepseek_v3"], torch.bfloat16)
    packed = pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    with safe_open(tmp_path / "file", "pt") as file:
        dtypes = {name: str(file.get_tensor(name).dtype).removeprefix("torch.") for name in file.keys()}  # noqa: SIM118
    assert dtypes["blocks.0.mixer.q_a_proj.values"] == dtypes["head.values"] == "int8"
    assert dtypes["blocks.0.feed_forward.gate_up_proj.values"] == "int8"
    assert dtypes["blocks.1.feed_forward.shared_expert.down_proj.scales"] == "float32"
    assert dtypes["experts/1/7"] == "uint8"
    assert dtypes["embedding.weight"] == dtypes["blocks.0.input_norm.weight"] == "bfloat16"
    assert dtypes["blocks.0.mixer.kv_b_proj.weight"] == "bfloat16"
    assert dtypes["blocks.1.feed_forward.router.weight_ED"] == "float32"
    rounded = {part.part for part in packed.parts if part.error is not None}
    assert rounded == {Part.ATTENTION, Part.DENSE, Part.SHARED, Part.EXPERTS, Part.HEAD}


def test_the_error_is_measured_against_the_weights(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    packed = pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    banks = [block.feed_forward.experts for block in model.blocks]
    weights = [weight for bank in banks for weight in (bank.gate_up_EFD, bank.down_EDF)]
    errors = torch.cat([(pack_int8(weight).unpack() - weight).abs().flatten() for weight in weights])
    scale = torch.cat([weight.flatten() for weight in weights]).square().mean().sqrt()
    error = get_part(packed, Part.EXPERTS).error
    assert error is not None
    assert error.largest == pytest.approx((errors.max() / scale).item(), rel=1e-5)
    assert error.mean == pytest.approx((errors.mean() / scale).item(), rel=1e-5)
    assert 0.001 < error.mean < error.largest < 0.02


def test_int8_products_are_near_those_of_the_floats(tmp_path: Path) -> None:
    """Of 64 normal weights the largest is 2.4 standard deviations on average, so that rounding leaves an error of
    2.4 / 127 / sqrt(12) = 0.55 % of them; rounding activations too adds one of about that size."""
    keys = FAMILY_KEYS["gpt_oss"] | {"hidden_size": 128}
    write_model(tmp_path / "model", keys)
    pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    exact = load_folder(tmp_path / "model")
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    for product, share in ((Int8Product.W8, 0.0055), (Int8Product.W8A8, 0.0055 * 2**0.5)):
        found = load_model(tmp_path / "file", product=product)
        for module in (lambda model: model.compute_logits, lambda model: model.blocks[1].mixer.qkv_proj):
            expected = module(exact)(x)
            error = ((module(found)(x) - expected).norm() / expected.norm()).item()
            assert error == pytest.approx(share, rel=0.2)


def test_bits_per_weight_are_those_of_the_format(tmp_path: Path) -> None:
    keys = FAMILY_KEYS["qwen3_moe"] | {"hidden_size": 128, "moe_intermediate_size": 64, "head_dim": 32}
    write_model(tmp_path / "model", keys, torch.bfloat16)
    packed = pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    for part in (Part.HEAD, Part.EXPERTS):
        # A byte a weight, a float32 scale for 64 of them; experts are padded to pages.
        found = get_part(packed, part).bits_per_weight
        assert 8.5 <= found < (8.5001 if part is Part.HEAD else 10)
    assert get_part(packed, Part.EMBEDDING).bits_per_weight == 16
    assert get_part(packed, Part.ROUTER).bits_per_weight == 32


@pytest.mark.parametrize("form", PackedForm)
@pytest.mark.parametrize("name", TWO_STORAGES)
def test_stacked_and_separate_experts_give_the_same_file(name: str, form: PackedForm, tmp_path: Path) -> None:
    for storage in ExpertStorage:
        write_model(tmp_path / storage, FAMILY_KEYS[name], experts=storage)
        pack_model(tmp_path / storage, tmp_path / f"{storage}.packed", form=form)
    one, other = (tmp_path / f"{storage}.packed" for storage in ExpertStorage)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own", "bf16"])
@pytest.mark.parametrize("make", [make_fp8, make_mxfp4])
def test_quantised_sources_are_decoded(
    make: Callable[[Path], None], dtype: torch.dtype | None, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    packed = pack_model(tmp_path / "model", tmp_path / "file", dtype)
    found = load_model(tmp_path / "file")
    assert torch.equal(compute_logits(found), compute_logits(load_folder(tmp_path / "model", dtype)))
    assert packed.is_lossy == (dtype is not None)
    pack_model(tmp_path / "model", tmp_path / "int8", form=PackedForm.INT8)
    expected = quantize_in_memory(load_folder(tmp_path / "model"))
    assert torch.equal(compute_logits(load_model(tmp_path / "int8")), compute_logits(expected))


@pytest.mark.parametrize("block", [(8, 16), None], ids=["blocks", "whole"])
def test_stacked_experts_in_fp8_are_decoded_one_by_one(block: tuple[int, int] | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model(folder, FAMILY_KEYS["qwen3_moe"], experts=ExpertStorage.STACKED)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        encoded = [quantise_fp8(matrix, block or matrix.shape, torch.clone) for matrix in tensors[name]]
        tensors[name] = torch.stack([values for values, _, _ in encoded])
        factors = torch.stack([factors for _, factors, _ in encoded])
        tensors[f"{name}_scale_inv"] = factors if block else factors.unsqueeze(0)
    write_quantised(folder, tensors, {"quant_method": "fp8", "weight_block_size": block and list(block)})
    pack_model(folder, tmp_path / "file")
    assert torch.equal(compute_logits(load_model(tmp_path / "file")), compute_logits(load_folder(folder)))


def test_a_head_that_the_config_does_not_know_of_is_packed(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    pack_model(tmp_path / "model", tmp_path / "file")
    expected = load_folder(tmp_path / "model")
    assert expected.head is not None
    assert torch.equal(compute_logits(load_model(tmp_path / "file")), compute_logits(expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_int8_cannot_hold_are_refused(value: float, tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"])
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 2] = value
    save_file(tensors, weights)
    with pytest.raises(
        ModelFormatError, match=r"blocks\.1\.mixer\.o_proj cannot be packed as int8: .* NaN or Inf"
    ):
        pack_model(tmp_path / "model", tmp_path / "file", form=PackedForm.INT8)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    pack_model(tmp_path / "model", tmp_path / "file")


def test_a_file_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["llama"])
    target = tmp_path / "file"
    target.write_text("precious")
    with pytest.raises(
        ConfigError, match="exists; give another file with --to, or replace it with --overwrite"
    ):
        pack_model(tmp_path / "model", target)
    assert target.read_text() == "precious"
    pack_model(tmp_path / "model", target, overwrites=True)
    assert load_model(target).config.num_layers == 2
    with pytest.raises(ConfigError, match="lies in the folder that is read"):
        pack_model(tmp_path / "model", tmp_path / "model" / "model.safetensors", overwrites=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is a folder; give a file"):
        pack_model(tmp_path / "model", tmp_path / "folder", overwrites=True)


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["deepseek_v2"], torch.bfloat16)
    packing: list[tuple[int, int]] = []
    loading: list[tuple[int, int]] = []
    pack_model(
        tmp_path / "model", tmp_path / "file", on_progress=lambda done, total: packing.append((done, total))
    )
    load_model(tmp_path / "file", on_progress=lambda done, total: loading.append((done, total)))
    for steps in (packing, loading):
        assert len(steps) > 10
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"], torch.bfloat16)
    pack_model(tmp_path / "model", tmp_path / "file")
    for path in (tmp_path / "model", tmp_path / "file"):
        with pytest.raises(IneffectiveOptionError, match="product w8a8 has no effect on"):
            load_model(path, product=Int8Product.W8A8)
    load_model(tmp_path / "file", torch.bfloat16)
    with pytest.raises(
        ModelFormatError, match=r"packed to be computed in torch\.bfloat16, not in torch\.float32"
    ):
        load_model(tmp_path / "file", torch.float32)


def test_a_packed_file_is_not_packed_again(tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["llama"])
    pack_model(tmp_path / "model", tmp_path / "file")
    with pytest.raises(ModelFormatError, match=r"is a file, and the folder .* is needed here"):
        pack_model(tmp_path / "file", tmp_path / "again")
