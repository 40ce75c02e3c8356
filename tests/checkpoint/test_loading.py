"""The way of bytes from a file into a model: every stride, cast and cut arrives, and a damaged way is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesys.checkpoint import model_files, streaming, tensor_source
from moesys.checkpoint.model_files import FileTensor, Span, open_model_files
from moesys.checkpoint.safetensors_file import write_chunks
from moesys.checkpoint.safetensors_header import TensorRecord
from moesys.checkpoint.stored_chunks import iterate_chunks
from moesys.checkpoint.streaming import DirectPiece, StagedPiece, stream
from moesys.checkpoint.tensor_source import copy_range, find_source
from moesys.errors import ModelFormatError
from moesys.models import StoredTensor
from moesys.store import allocate_weight

VIEWS: dict[str, Callable[[], tuple[Tensor, tuple[int, ...]]]] = {
    "whole": lambda: (torch.full((6, 10), -1.0), (6, 10)),
    "one-row": lambda: (torch.full((6, 10), -1.0)[2], (10,)),
    "half-of-each-of-a-stack": lambda: (torch.full((3, 8, 10), -1.0)[:, 4:], (3, 4, 10)),
    "transposed": lambda: (torch.full((3, 8, 10), -1.0).transpose(1, 2), (3, 10, 8)),
    "interleaved": lambda: (
        torch.full((3, 8, 5), -1.0).unflatten(1, (2, 4)).transpose(1, 2).permute(0, 3, 1, 2),
        (3, 5, 8),
    ),
    "columns": lambda: (torch.full((6, 10), -1.0)[:, 3:5], (6, 2)),
    "one-element": lambda: (torch.full((4,), -1.0)[1:2], (1,)),
    "scalar": lambda: (torch.full((4,), -1.0)[1], ()),
    "nothing": lambda: (torch.full((4, 0), -1.0), (4, 0)),
}


@pytest.fixture(params=VIEWS)
def make_view(request: pytest.FixtureRequest) -> Callable[[], tuple[Tensor, tuple[int, ...]]]:
    return VIEWS[request.param]


def make_values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def load_into(stored: StoredTensor, tensors: Mapping[str, FileTensor]) -> list[object]:
    """Streams a tensor into its view; returns the pieces."""
    source = find_source(stored, tensors, None)
    assert source is not None
    assert not list(source.find_misfits())
    pieces = list(source.iterate_pieces())
    stream(pieces, lambda num_bytes: None)
    return pieces


@pytest.mark.parametrize("piece_bytes", [8, 24, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("min_run_bytes", [1, 2**16])
def test_every_view_is_filled_and_nothing_beside_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_view: Callable[[], tuple[Tensor, tuple[int, ...]]],
    piece_bytes: int,
    dtype: torch.dtype,
    min_run_bytes: int,
) -> None:
    monkeypatch.setattr(tensor_source, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(tensor_source, "_MIN_RUN_BYTES", min_run_bytes)
    monkeypatch.setattr(tensor_source, "_MAX_VIEWS", 2)
    view, shape = make_view()
    expected, _ = make_view()
    values = make_values(shape, dtype)
    expected.copy_(values.view(expected.shape))
    save_file({"before": torch.zeros(3), "x": values, "y": torch.zeros(5)}, tmp_path / "model.safetensors")
    with open_model_files(tmp_path) as tensors:
        pieces = load_into(StoredTensor("x", shape, view), tensors)
    assert torch.equal(view, expected)
    assert_outside_is_untouched(view, expected)
    assert all(
        piece.num_bytes <= piece_bytes for piece in pieces if isinstance(piece, DirectPiece | StagedPiece)
    )


def assert_outside_is_untouched(view: Tensor, expected: Tensor) -> None:
    def read_storage(tensor: Tensor) -> Tensor:
        storage = torch.empty(0, dtype=tensor.dtype)
        return storage.set_(tensor.untyped_storage(), 0, (tensor.untyped_storage().nbytes() // 4,))

    assert torch.equal(read_storage(view), read_storage(expected))


def test_equal_bytes_go_straight_into_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_source, "_MIN_RUN_BYTES", 64)
    save_file({"x": make_values((3, 4, 10))}, tmp_path / "model.safetensors")
    with open_model_files(tmp_path) as tensors:
        for view, kind in (
            (torch.empty(3, 4, 10), DirectPiece),
            (torch.empty(3, 8, 10)[:, 4:], DirectPiece),
            (torch.empty(3, 4, 20)[:, :, 10:], StagedPiece),
            (torch.empty(3, 4, 10, dtype=torch.bfloat16), StagedPiece),
        ):
            pieces = load_into(StoredTensor("x", (3, 4, 10), view), tensors)
            assert {type(piece) for piece in pieces} == {kind}


def test_what_goes_out_comes_in(
    tmp_path: Path, make_view: Callable[[], tuple[Tensor, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesys.checkpoint.stored_chunks._CHUNK_ELEMENTS", 7)
    view, shape = make_view()
    view.copy_(make_values(tuple(view.shape)))
    stored = StoredTensor("x", shape, view)
    for dtype, name in ((torch.float32, "F32"), (torch.bfloat16, "BF16")):
        path = tmp_path / name
        write_chunks(path, {"x": TensorRecord(name, shape)}, lambda _: iterate_chunks(stored, dtype))  # noqa: B023
        assert torch.equal(load_file(path)["x"], view.reshape(shape).to(dtype))


@pytest.mark.parametrize("start", range(0, 30, 7))
@pytest.mark.parametrize("count", [1, 5, 12, 30])
def test_ranges_of_a_view_are_those_of_its_elements(start: int, count: int) -> None:
    view = torch.zeros(5, 3, 2).transpose(0, 1)
    count = min(count, view.numel() - start)
    copy_range(view, start, torch.arange(1.0, count + 1))
    expected = torch.zeros(30)
    expected[start : start + count] = torch.arange(1.0, count + 1)
    assert torch.equal(view.flatten(), expected)


def test_bytes_are_counted_in_order(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(100)))
    descriptor = os.open(path, os.O_RDONLY)
    counted: list[int] = []
    memory = bytearray(100)
    spans = [Span(path, descriptor, start, 10) for start in range(0, 100, 10)]
    try:
        stream(
            [DirectPiece(span, (memoryview(memory)[span.offset : span.offset + 10],)) for span in spans],
            counted.append,
        )
    finally:
        os.close(descriptor)
    assert memory == path.read_bytes()
    assert counted == [10] * 10


def test_memory_is_filled_in_the_pieces_that_the_system_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(100)))
    descriptor = os.open(path, os.O_RDONLY)

    def read_a_little(descriptor: int, views: list[memoryview], offset: int) -> int:
        contents = os.pread(descriptor, 7, offset)
        taken = 0
        for view in views:
            part = contents[taken : taken + len(view)]
            view[: len(part)] = part
            taken += len(part)
        return taken

    monkeypatch.setattr(os, "preadv", read_a_little)
    memory = memoryview(bytearray(100))
    views = (memory[:3], memory[3:14], memory[14:14], memory[14:90])
    try:
        stream([DirectPiece(Span(path, descriptor, 0, 90), views)], lambda num_bytes: None)
    finally:
        os.close(descriptor)
    assert memory[:90] == path.read_bytes()[:90]


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": make_values((1000,))}, path)
    with open_model_files(tmp_path) as tensors:
        os.truncate(path, path.stat().st_size - 12)
        with pytest.raises(ModelFormatError, match="became shorter while it was read: 12 bytes are missing"):
            load_into(StoredTensor("x", (1000,), torch.empty(1000)), tensors)


def test_a_disk_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    save_file({"x": make_values((10,))}, tmp_path / "model.safetensors")
    with open_model_files(tmp_path) as tensors:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ModelFormatError, match=r"cannot read .*model.safetensors: Input/output error"):
            load_into(StoredTensor("x", (10,), torch.empty(10)), tensors)


def test_an_error_of_the_caller_leaves_no_reader_behind(tmp_path: Path) -> None:
    save_file({"x": make_values((10,))}, tmp_path / "model.safetensors")

    def fail(parts: tuple[Tensor, ...]) -> None:
        raise ZeroDivisionError

    with open_model_files(tmp_path) as tensors:
        pieces = [StagedPiece((tensors["x"].span,), fail)] * 100
        with pytest.raises(ZeroDivisionError):
            stream(pieces, lambda num_bytes: None)


def test_staging_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": make_values((1000,))}, tmp_path / "model.safetensors")
    seen: set[int] = set()
    monkeypatch.setattr(tensor_source, "PIECE_BYTES", 40)
    monkeypatch.setattr(streaming, "PIECE_BYTES", 40)
    with open_model_files(tmp_path) as tensors:
        source = find_source(StoredTensor("x", (1000,), torch.empty(1000).bfloat16()), tensors, None)
        assert source is not None
        pieces = [
            StagedPiece(piece.spans, lambda parts: seen.add(parts[0].data_ptr()))
            for piece in source.iterate_pieces()
            if isinstance(piece, StagedPiece)
        ]
        stream(pieces, lambda num_bytes: None)
    assert len(pieces) == 100
    assert len(seen) <= 2 * streaming.NUM_READERS


def test_large_weights_lie_in_memory_that_is_resident_when_written() -> None:
    weight = allocate_weight((1024, 2048), torch.bfloat16)
    assert (weight.shape, weight.dtype, weight.is_contiguous()) == ((1024, 2048), torch.bfloat16, True)
    weight.fill_(2.0)
    assert weight.sum(dtype=torch.float32) == 2.0 * 2**21
    kept = weight[5:6]
    del weight
    assert kept.eq(2.0).all()
    assert allocate_weight((0, 3), torch.float32).numel() == 0


ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f' {{"x": {ENTRY}}}', "does not begin with {"),
        ("[]", "does not begin with {"),
        ("{", "Expecting property name"),
        (f'{{"x": {ENTRY}, "x": {ENTRY}}}', "has the name 'x' twice"),
        ('{"x": {"dtype": "F32", "dtype": "F32"}}', "has the name 'dtype' twice"),
        (f'{{"x": {ENTRY}, "y": NaN}}', "has NaN, which is no JSON"),
        (f'{{"\\ud800": {ENTRY}}}', "surrogates not allowed"),
        (f'{{"x": {ENTRY}, "__metadata__": {{"a": 1}}}}', "__metadata__ is not an object of texts"),
        (f'{{"x": {ENTRY}, "__metadata__": []}}', "__metadata__ is not an object of texts"),
        (f'{{"x": {ENTRY}, "deep": {"[" * 50_000}', "nested too deeply"),
        (f'{{"x": {ENTRY}, "y": {ENTRY}}}', "y should lie at bytes 4 to 8, not 0 to 4"),
        (f'{{"x": {ENTRY.replace("[0, 4]", "[1, 5]")}}}', "x should lie at bytes 0 to 4, not 1 to 5"),
        (f'{{"x": {ENTRY.replace("[1]", "[-1]")}}}', "its shape of x is -1"),
        (f'{{"x": {ENTRY.replace("[1]", "[true]")}}}', "its shape of x is True"),
        (f'{{"x": {ENTRY.replace("[1]", "[4294967296, 4294967296]")}}}', "a shape too large"),
        (f'{{"x": {ENTRY.replace("F32", "F4")}}}', "x has the unknown dtype 'F4'"),
        (f'{{"x": {ENTRY.replace("[0, 4]", "[0, 4, 8]")}}}', "no dtype, shape and offsets for x"),
        ("{}", "its tensors end at byte 0 of 4"),
    ],
)
def test_headers_that_no_reader_should_believe(tmp_path: Path, header: str, message: str) -> None:
    contents = header.encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(contents).to_bytes(8, "little") + contents + bytes(4))
    with pytest.raises(ModelFormatError) as caught, open_model_files(tmp_path):
        pass
    assert str(path) in str(caught.value)
    assert "is not a whole safetensors file" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("length", [13, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_header_cannot_be_longer_than_its_file(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(10))
    with (
        pytest.raises(ModelFormatError, match=f"its header claims {length} bytes of at most 12"),
        open_model_files(tmp_path),
    ):
        pass


def test_json_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert model_files.read_json_object(path) == {"a": 1}
    monkeypatch.setattr(model_files, "_MAX_JSON_BYTES", 7)
    with pytest.raises(ModelFormatError, match="larger than 7 bytes"):
        model_files.read_json_object(path)
