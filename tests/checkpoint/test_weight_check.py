"""NaN and Inf are found wherever they are, in every format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from family_keys import FAMILY_KEYS
from model_folders import write_model, write_sparse_model
from moesys.checkpoint import NonFinite, check_weights, nonfinite
from moesys.checkpoint.nonfinite import count_nonfinite
from moesys.errors import ModelFormatError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BYTE_FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("value", "expected"), [("nan", (1, 0)), ("inf", (0, 1)), ("-inf", (0, 1)), ("1", (0, 0))]
)
def test_one_value_is_found_anywhere(dtype: torch.dtype, value: str, expected: tuple[int, int]) -> None:
    for position in (0, 7, 98, 99):
        values = torch.arange(100).to(dtype)
        values[position] = float(value)
        assert count_nonfinite(values) == expected


@pytest.mark.parametrize("dtype", BYTE_FLOATS, ids=str)
def test_every_byte_is_judged_as_torch_does(dtype: torch.dtype) -> None:
    values = torch.arange(256).to(torch.uint8).view(dtype)
    for value in values:
        wide = value.float()
        assert count_nonfinite(value[None]) == (int(wide.isnan()), int(wide.isinf()))
    wide = values.float()
    assert count_nonfinite(values) == (int(wide.isnan().sum()), int(wide.isinf().sum()))


def test_integers_and_nothing_are_finite() -> None:
    assert count_nonfinite(torch.full((9,), 255, dtype=torch.uint8)) == (0, 0)
    assert count_nonfinite(torch.empty(0)) == (0, 0)


def test_tensors_are_named_and_counted_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "PIECE_BYTES", 64)
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"], torch.bfloat16)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"].view(-1)[[0, 500, 2047]] = torch.tensor(
        [float("nan"), float("inf"), float("nan")], dtype=torch.bfloat16
    )
    tensors["model.norm.weight"][3] = float("-inf")
    save_file(tensors, path)
    steps: list[tuple[int, int]] = []
    check = check_weights(tmp_path / "model", lambda done, total: steps.append((done, total)))
    assert check.found == (NonFinite("lm_head.weight", 2, 1), NonFinite("model.norm.weight", 0, 1))
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert (check.num_bytes, check.num_tensors) == (num_bytes, len(tensors))
    assert steps[-1] == (num_bytes, num_bytes)
    assert check.bytes_per_second > 0


def test_all_shards_are_read(tmp_path: Path) -> None:
    total = write_sparse_model(tmp_path / "model", FAMILY_KEYS["olmoe"], num_shards=3)
    check = check_weights(tmp_path / "model")
    assert (check.num_bytes, check.found) == (total, ())


def test_an_exponent_of_mxfp4_can_be_nan(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text("{}")
    scales = torch.tensor([127, 255], dtype=torch.uint8)
    blocks = torch.full((2, 16), 255, dtype=torch.uint8)
    tensors = {"w_blocks": blocks, "w_scales": scales, "other_scales": scales.clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert check_weights(tmp_path).found == (NonFinite("w_scales", 1, 0),)


def test_files_that_are_missing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="missing"):
        check_weights(tmp_path)
