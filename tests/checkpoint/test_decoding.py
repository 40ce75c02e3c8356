"""Formats of quantised checkpoints, against their definitions written out by hand."""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import DEEPSEEK, GPT_OSS, WEIGHTS, make_checkpoint, quantise_fp8, write_quantised
from torch import Tensor

from moesys.checkpoint import load_model, save_model, tensor_source
from moesys.checkpoint.decoding import decode_exponents, decode_fp8, decode_mxfp4
from moesys.errors import ModelFormatError
from moesys.models import FAMILIES

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def float8_bits(byte: int) -> float:
    """E4M3 as its paper defines it (arXiv 2209.05433)."""
    sign = -1.0 if byte & 128 else 1.0
    exponent, fraction = (byte >> 3) & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10))


def test_exponents_are_powers_of_two() -> None:
    found = decode_exponents(torch.arange(256, dtype=torch.uint8)).tolist()
    assert found[:255] == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(found[255])
    typed = torch.tensor([[120], [127]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert decode_exponents(typed).tolist() == [[2.0**-7], [1.0]]


def test_mxfp4_is_its_definition() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)
    exponents = torch.tensor([0, 1, 100, 120, 126, 127, 128, 129, 130, 140, 150, 160, 200, 250, 251, 252])
    found = decode_mxfp4(blocks, exponents.to(torch.uint8)).tolist()
    expected = []
    for row, exponent in zip(blocks.tolist(), exponents.tolist(), strict=True):
        for byte in row:
            for half in (byte & 15, byte >> 4):
                value = -E2M1[half - 8] if half & 8 else E2M1[half]
                expected.append(value * 2.0 ** (exponent - 127))
    assert [struct.pack("f", value) for value in found] == [struct.pack("f", value) for value in expected]


@pytest.mark.parametrize("block", [(4, 3), (5, 7), (100, 2), (1, 100)])
@pytest.mark.parametrize("first_row", [0, 2])
def test_fp8_blocks_end_where_the_matrix_does(block: tuple[int, int], first_row: int) -> None:
    rows, columns = 11, 8
    first_row %= block[0]
    grid = -(-(first_row + rows) // block[0]), -(-columns // block[1])
    factors = torch.rand(grid, generator=torch.Generator().manual_seed(0)) + 0.5
    codes = (torch.arange(rows * columns, dtype=torch.int32) * 2).to(torch.uint8).view(rows, columns)
    found = decode_fp8(codes.view(torch.float8_e4m3fn), factors, block, first_row)
    for row, column in itertools.product(range(rows), range(columns)):
        factor = factors[(first_row + row) // block[0], column // block[1]]
        value = float8_bits(int(codes[row, column]))
        assert math.isnan(value) or found[row, column] == value * factor


def encode_e8m0(factors: Tensor) -> Tensor:
    return (torch.log2(factors) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def is_matrix_in_fp8(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and "proj" in name


@pytest.mark.parametrize("encode", [torch.clone, torch.Tensor.bfloat16, encode_e8m0])
@pytest.mark.parametrize("elements", [1, 40, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_checkpoints_load_as_what_they_stand_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encode: Callable[[Tensor], Tensor],
    elements: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(tensor_source, "_DECODED_ELEMENTS", elements)
    meant = make_checkpoint(tmp_path, DEEPSEEK)
    stored: dict[str, Tensor] = {}
    for name, tensor in meant.items():
        if is_matrix_in_fp8(name, tensor):
            stored[name], stored[f"{name}_scale_inv"], meant[name] = quantise_fp8(tensor, (4, 8), encode)
        else:
            stored[name] = tensor
    write_quantised(tmp_path, stored, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 8]})
    assert_loads_as(tmp_path, meant, dtype)


def test_fp8_with_one_factor_per_matrix(tmp_path: Path) -> None:
    meant = make_checkpoint(tmp_path, DEEPSEEK)
    stored: dict[str, Tensor] = {}
    for name, tensor in meant.items():
        if is_matrix_in_fp8(name, tensor):
            values, factors, meant[name] = quantise_fp8(tensor, (1000, 1000), torch.clone)
            stored |= {name: values, f"{name}_scale_inv": factors.view(())}
        else:
            stored[name] = tensor
    write_quantised(tmp_path, stored, {"quant_method": "fp8", "weight_block_size": None})
    assert_loads_as(tmp_path, meant, torch.float32)


@pytest.mark.parametrize("ending", [".weight_scale_inv", ".scale", ".qscale_weight"])
def test_factors_are_found_under_every_name_in_use(tmp_path: Path, ending: str) -> None:
    meant = make_checkpoint(tmp_path, DEEPSEEK)
    stored: dict[str, Tensor] = {}
    for name, tensor in meant.items():
        if is_matrix_in_fp8(name, tensor):
            factors_name = name.removesuffix(".weight") + ending
            stored[name], stored[factors_name], meant[name] = quantise_fp8(tensor, (4, 8), torch.clone)
        else:
            stored[name] = tensor
    write_quantised(tmp_path, stored, {"quant_method": "fp8", "weight_block_size": [4, 8]})
    assert_loads_as(tmp_path, meant, torch.float32)


def test_factors_under_two_names_are_refused(quantised: tuple[Path, str]) -> None:
    folder, name = quantised
    tensors = load_file(folder / WEIGHTS)
    second = f"{name.removesuffix('.weight')}.scale"
    save_file(tensors | {second: tensors[f"{name}_scale_inv"].clone()}, folder / WEIGHTS)
    with pytest.raises(ModelFormatError, match=f"not expected: {re.escape(second)}"):
        load_model(folder)


def test_a_wrong_shape_of_factors_is_told_by_their_own_name(quantised: tuple[Path, str]) -> None:
    folder, name = quantised
    tensors = load_file(folder / WEIGHTS)
    factors_name = f"{name.removesuffix('.weight')}.qscale_weight"
    tensors[factors_name] = tensors.pop(f"{name}_scale_inv")[:, :2].contiguous()
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFormatError, match=re.escape(f"{factors_name} has shape (6, 2)")):
        load_model(folder)


def test_stacked_experts_in_fp8(tmp_path: Path) -> None:
    tensors = make_checkpoint(tmp_path, DEEPSEEK)
    prefix = "model.layers.1.mlp.experts"
    names = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
    meant = dict(tensors)
    for stacked, parts in names.items():
        experts = [
            torch.cat([tensors.pop(f"{prefix}.{expert}.{part}.weight") for part in parts])
            for expert in range(4)
        ]
        pieces = [quantise_fp8(expert, (4, 8), torch.clone) for expert in experts]
        tensors[f"{prefix}.{stacked}_proj"] = torch.stack([values for values, _, _ in pieces])
        tensors[f"{prefix}.{stacked}_proj_scale_inv"] = torch.stack([factors for _, factors, _ in pieces])
        for expert, (_, _, decoded) in enumerate(pieces):
            for part, matrix in zip(parts, decoded.chunk(len(parts)), strict=True):
                meant[f"{prefix}.{expert}.{part}.weight"] = matrix
    write_quantised(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 8]})
    assert_loads_as(tmp_path, meant, torch.float32)


@pytest.mark.parametrize("elements", [32, 96, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_checkpoints_load_as_what_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tensor_source, "_DECODED_ELEMENTS", elements)
    meant = make_checkpoint(tmp_path, GPT_OSS)
    stored = dict(meant)
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in meant if name.endswith("_proj") and "experts" in name]:
        experts, inputs, outputs = stored.pop(name).shape
        groups = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*groups, 16), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(118, 130, groups, generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        decoded = decode_mxfp4(blocks, exponents).view(experts, outputs, inputs)
        meant[name] = decoded.transpose(1, 2).contiguous()
    write_quantised(tmp_path, stored, {"quant_method": "mxfp4"})
    assert_loads_as(tmp_path, meant, dtype)


def assert_loads_as(folder: Path, meant: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Loads, writes in the plain layout, and compares every bit."""
    model = load_model(folder, dtype)
    again = folder / "again"
    again.mkdir()
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    family = next(family for family in FAMILIES if model_type in family.model_types)
    save_model(model, again, torch.float32, {}, family=family)
    found = load_file(again / WEIGHTS)
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        kept = "mlp.gate." in name or "router" in name
        expected = tensor if kept else tensor.to(dtype).float()
        assert torch.equal(found[name], expected), name


@pytest.fixture
def quantised(tmp_path: Path) -> tuple[Path, str]:
    tensors = make_checkpoint(tmp_path, DEEPSEEK)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"], _ = quantise_fp8(tensors[name], (4, 8), torch.clone)
    write_quantised(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 8]})
    load_model(tmp_path)
    return tmp_path, name


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (None, "missing: model.layers.0.mlp.up_proj.weight_scale_inv (6, 3)"),
        (torch.ones(6, 2), "weight_scale_inv has shape (6, 2), config.json asks for (6, 3)"),
        (torch.ones(6, 3, dtype=torch.int32), "stored as I32; factors are F32, BF16 or exponents"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    quantised: tuple[Path, str], factors: Tensor | None, message: str
) -> None:
    folder, name = quantised
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"{name}_scale_inv"]
    save_file(tensors if factors is None else tensors | {f"{name}_scale_inv": factors}, folder / WEIGHTS)
    with pytest.raises(ModelFormatError) as caught:
        load_model(folder)
    assert message in str(caught.value)


def test_mxfp4_without_scales_or_in_another_dtype_is_refused(tmp_path: Path) -> None:
    tensors = make_checkpoint(tmp_path, GPT_OSS)
    name = "model.layers.0.mlp.experts.down_proj"
    del tensors[name], tensors["model.layers.0.mlp.experts.gate_up_proj"]
    tensors[f"{name}_blocks"] = torch.zeros(3, 32, 2, 16, dtype=torch.int8)
    tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"] = torch.zeros(3, 128, 1, 16, dtype=torch.uint8)
    tensors["model.layers.0.mlp.experts.gate_up_proj_scales"] = torch.zeros(3, 128, 2, dtype=torch.uint8)
    write_quantised(tmp_path, tensors, {"quant_method": "mxfp4"})
    with pytest.raises(ModelFormatError) as caught:
        load_model(tmp_path)
    assert f"missing: {name}_scales (3, 32, 2)" in str(caught.value)
    assert "gate_up_proj_scales has shape (3, 128, 2), config.json asks for (3, 128, 1)" in str(caught.value)
    save_file(tensors | {f"{name}_scales": torch.zeros(3, 32, 2, dtype=torch.uint8)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelFormatError, match="down_proj_blocks is stored as I8; mxfp4 needs U8"):
        load_model(tmp_path)
