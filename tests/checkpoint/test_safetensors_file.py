"""One safetensors file: what other readers see in it, casts, strides, memory and what the parser refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moesys.checkpoint.files import FileSystem, WrittenFile
from moesys.checkpoint.safetensors_file import (
    TensorRecord,
    read_safetensors,
    record_tensor,
    verify_safetensors,
    write_safetensors,
)
from moesys.errors import CheckpointError, DamagedCheckpointError


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "mask": torch.tensor([True, False, True]),
        "weight": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    contents = path.read_bytes()
    num_bytes = int.from_bytes(contents[:8], "little")
    return num_bytes, json.loads(contents[8 : 8 + num_bytes])


def write_raw(path: Path, header: dict[str, Any], payload: bytes) -> WrittenFile:
    text = json.dumps(header).encode()
    chunks = [len(text).to_bytes(8, "little"), text, payload]
    return FileSystem().write_new_file(path, chunks, 0)


def test_safe_open_reads_every_tensor_and_the_metadata(tmp_path: Path) -> None:
    tensors = make_tensors()
    path = tmp_path / "a.safetensors"
    written = write_safetensors(path, tensors, metadata={"format": "pt", "note": "ä"})
    assert written.size_bytes == path.stat().st_size
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ä"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert file.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(file.get_tensor(name), tensor)


def test_no_metadata_is_written_unless_given(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", {"x": torch.zeros(2)})
    assert "__metadata__" not in header_of(tmp_path / "a")[1]


def test_every_tensor_is_cast_and_the_callers_stay(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(4, 4), "y": torch.randn(3).bfloat16(), "z": torch.randn(2).double()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "a", tensors, dtype=torch.bfloat16)
    loaded = load_file(tmp_path / "a")
    for name, tensor in tensors.items():
        assert loaded[name].dtype == torch.bfloat16
        assert torch.equal(loaded[name], tensor.bfloat16())
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[1],
        lambda x: x[:, 1:3],
        lambda x: x[::2, ::3],
        lambda x: x[:1].expand(5, -1),
        lambda x: x[1, 3:][::2][:1],
        lambda x: torch._neg_view(x),
        lambda x: torch.nn.Parameter(x)[1:],
    ],
)
def test_views_are_written_as_they_look(
    tmp_path: Path, view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None
) -> None:
    tensor = view(torch.arange(48.0).reshape(6, 8))
    write_safetensors(tmp_path / "a", {"x": tensor}, dtype=dtype)
    assert torch.equal(load_file(tmp_path / "a")["x"], tensor.to(dtype or torch.float32))


@pytest.mark.parametrize("length", range(1, 10))
def test_the_header_is_padded_and_every_tensor_aligned(tmp_path: Path, length: int) -> None:
    tensors = {"b" * length: torch.ones(3, dtype=torch.bool), "f": torch.ones(1), "d": torch.ones(1).double()}
    write_safetensors(tmp_path / "a", tensors)
    num_bytes, entries = header_of(tmp_path / "a")
    assert num_bytes % 8 == 0
    for name, tensor in tensors.items():
        assert entries[name]["data_offsets"][0] % tensor.itemsize == 0


def test_one_tensor_is_copied_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    written: list[int] = []
    empty = torch.empty

    def counting_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        copied.append(len(written))
        return empty(*args, **kwargs)

    class Counting(FileSystem):
        def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if call is os.write:
                written.append(len(args[1]))
            return super().system_call(call, *args, **kwargs)

    tensors = {name: torch.zeros(8, 8).t() for name in "abc"}
    monkeypatch.setattr(torch, "empty", counting_empty)
    write_safetensors(tmp_path / "a", tensors, dtype=torch.bfloat16, files=Counting())
    assert copied == [1, 2, 3]
    assert written[1:] == [128, 128, 128]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tensors = make_tensors()
    written = write_safetensors(tmp_path / "a", tensors, metadata={"format": "pt"})
    expected = {name: record_tensor(name, tensor) for name, tensor in tensors.items()}
    verify_safetensors(tmp_path / "a", written, expected)
    loaded = read_safetensors(tmp_path / "a", written, expected)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("__metadata__", torch.zeros(2), "rename"),
        ("", torch.zeros(2), "rename"),
        ("x", torch.zeros(2, dtype=torch.complex64), "complex64"),
        ("x", torch.zeros(2, device="meta"), "materialise"),
        ("x", torch.zeros(2, 2).to_sparse(), "dense"),
    ],
)
def test_what_no_file_can_hold_is_refused_before_a_file_exists(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(tmp_path / "a", {"ok": torch.zeros(1), name: tensor})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "should lie at bytes 0 to 8"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "should lie at bytes 0 to 8"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "end at byte 4 of 8"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "shape of x is -2"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}, "too large"),
        ({"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype"),
        ({"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}, "other tensors"),
        ({"dtype": "F32", "shape": [2]}, "no dtype, shape and offsets"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    written = write_raw(tmp_path / "a", {"x": entry}, bytes(8))
    for read in (read_safetensors, verify_safetensors):
        with pytest.raises(DamagedCheckpointError, match=message):
            read(tmp_path / "a", written, {"x": TensorRecord("F32", (2,))})


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    contents = (2**40).to_bytes(8, "little") + b"{}"
    written = FileSystem().write_new_file(tmp_path / "a", [contents], len(contents))
    with pytest.raises(DamagedCheckpointError, match="claims"):
        read_safetensors(tmp_path / "a", written, {})
