"""From the bytes of a file to one of our tensors: what a checkpoint must hold for it, and in which pieces it comes.

Knows `StoredTensor` and the encodings; knows nothing of threads or of families. A source says first whether the file's
tensors fit, from their headers alone, and then cuts the way into pieces: straight into the model's memory where the
bytes are equal, else through staging memory, converted a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from moesys.checkpoint.decoding import MXFP4_GROUP, decode_fp8, decode_mxfp4
from moesys.checkpoint.model_files import FileTensor
from moesys.checkpoint.quantization import Fp8Blocks
from moesys.checkpoint.safetensors_file import view_bytes
from moesys.checkpoint.safetensors_header import TensorRecord
from moesys.checkpoint.streaming import PIECE_BYTES, DirectPiece, Piece, StagedPiece
from moesys.models import Encoding, StoredTensor

_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
_EXPONENT_DTYPES = ("U8", "F8_E8M0")
_DECODED_ELEMENTS = 2**20
"""Elements decoded at a time: what decoding needs besides is 12 times as many bytes."""

_MIN_RUN_BYTES = 2**16
"""Shorter runs of memory are cheaper to copy from staging memory than to hand to the system one by one."""

_MAX_VIEWS = 500


class TensorSource(Protocol):
    """What a checkpoint holds for one `StoredTensor`. Implementations are frozen records."""

    @property
    def stored(self) -> StoredTensor: ...

    def take(self, index: int) -> TensorSource:
        """Returns where the part at ``index`` of the first dimension comes from: one expert of a stacked bank."""
        ...

    def place(self, stored: StoredTensor) -> TensorSource:
        """Returns where the same tensor comes from when it is to be read into other memory."""
        ...

    @property
    def tensors(self) -> Mapping[str, FileTensor]:
        """The tensors of the checkpoint that are read, by name."""
        ...

    def find_misfits(self) -> Iterator[str]:
        """Yields why they cannot be decoded into the stored tensor's shape; nothing when they can."""
        ...

    def iterate_pieces(self) -> Iterator[Piece]:
        """Yields pieces that together fill the stored tensor's view, in the order of the file."""
        ...


def list_expected(stored: StoredTensor, fp8: Fp8Blocks | None) -> dict[str, tuple[int, ...]]:
    """Returns the names, with their shapes, that a checkpoint needs to hold a tensor.

    fp8: given where the checkpoint stores it in FP8.
    """
    if stored.encoding is Encoding.MXFP4:
        *rows, columns = stored.shape
        groups = (*rows, columns // MXFP4_GROUP)
        return {f"{stored.name}_blocks": (*groups, MXFP4_GROUP // 2), f"{stored.name}_scales": groups}
    expected = {stored.name: stored.shape}
    if fp8 is not None:
        expected[_list_factors_names(stored.name)[0]] = _factors_shape(stored.shape, fp8)
    return expected


def find_source(
    stored: StoredTensor, files: Mapping[str, FileTensor], fp8: Fp8Blocks | None
) -> TensorSource | None:
    """Returns where a tensor comes from; None when the files hold it in no form, or not all of it.

    fp8: how the checkpoint's FP8 tensors are cut into blocks; None when it says that it has none.
    """
    if stored.encoding is Encoding.MXFP4:
        blocks, exponents = files.get(f"{stored.name}_blocks"), files.get(f"{stored.name}_scales")
        return None if blocks is None or exponents is None else Mxfp4Source(stored, blocks, exponents)
    values = files.get(stored.name)
    if values is None:
        return None
    if fp8 is None or values.record.dtype != "F8_E4M3":
        return PlainSource(stored, values)
    name = next((name for name in _list_factors_names(stored.name) if name in files), None)
    return None if name is None else Fp8Source(stored, values, name, files[name], fp8)


@dataclass(frozen=True)
class PlainSource:
    """One tensor of floats."""

    stored: StoredTensor
    values: FileTensor

    @property
    def tensors(self) -> dict[str, FileTensor]:
        """See `TensorSource`."""
        return {self.stored.name: self.values}

    def take(self, index: int) -> PlainSource:
        """See `TensorSource`."""
        return PlainSource(self.stored.take(index), self.values.take(index))

    def place(self, stored: StoredTensor) -> PlainSource:
        """See `TensorSource`."""
        return replace(self, stored=stored)

    def find_misfits(self) -> Iterator[str]:
        """See `TensorSource`."""
        record = self.values.record
        if record.dtype not in _PLAIN_DTYPES:
            yield f"{self.stored.name} is stored as {record.dtype}, of which config.json says nothing that decodes it"
        yield from _find_wrong_shape(self.stored.name, self.values, self.stored.shape)

    def iterate_pieces(self) -> Iterator[Piece]:
        """See `TensorSource`."""
        dtype, view = self.values.record.torch_dtype, self.stored.view.detach()
        run_bytes = _count_run(view) * view.itemsize
        if (
            view.dtype == dtype
            and view.device.type == "cpu"
            and (view.is_contiguous() or run_bytes >= _MIN_RUN_BYTES)
        ):
            return _iterate_direct(view, self.values)
        return self._iterate_staged(view, dtype)

    def _iterate_staged(self, view: Tensor, dtype: torch.dtype) -> Iterator[Piece]:
        step = PIECE_BYTES // dtype.itemsize
        for start in range(0, view.numel(), step):
            count = min(step, view.numel() - start)

            def deliver(parts: tuple[Tensor, ...], start: int = start) -> None:
                copy_range(view, start, parts[0].view(dtype))

            yield StagedPiece(
                (self.values.span.cut(start * dtype.itemsize, count * dtype.itemsize),), deliver
            )


@dataclass(frozen=True)
class Fp8Source:
    """Matrices in float8 e4m3 and, in a second tensor, one factor per block, which multiplies."""

    stored: StoredTensor
    values: FileTensor
    factors_name: str
    factors: FileTensor
    fp8: Fp8Blocks

    @property
    def tensors(self) -> dict[str, FileTensor]:
        """See `TensorSource`."""
        return {self.stored.name: self.values, self.factors_name: self.factors}

    def take(self, index: int) -> Fp8Source:
        """See `TensorSource`."""
        record = TensorRecord(self.factors.record.dtype, _factors_shape(self.stored.shape, self.fp8))
        factors = FileTensor(record, self.factors.span).take(index)
        return replace(self, stored=self.stored.take(index), values=self.values.take(index), factors=factors)

    def place(self, stored: StoredTensor) -> Fp8Source:
        """See `TensorSource`."""
        return replace(self, stored=stored)

    def find_misfits(self) -> Iterator[str]:
        """See `TensorSource`."""
        name, shape = self.stored.name, self.stored.shape
        if len(shape) < 2:
            yield f"{name} is stored as F8_E4M3; only matrices are, and its shape is {shape}"
            return
        yield from _find_wrong_shape(name, self.values, shape)
        expected = _factors_shape(shape, self.fp8)
        if self.fp8.rows is not None:
            yield from _find_wrong_shape(self.factors_name, self.factors, expected)
        elif math.prod(self.factors.record.shape) != math.prod(expected):
            yield f"{self.factors_name} has shape {self.factors.record.shape}, one factor per matrix is needed"
        if self.factors.record.dtype not in ("F32", "BF16", *_EXPONENT_DTYPES):
            yield f"{self.factors_name} is stored as {self.factors.record.dtype}; factors are F32, BF16 or exponents"

    def iterate_pieces(self) -> Iterator[Piece]:
        """See `TensorSource`."""
        *_, rows, columns = self.stored.shape
        if not math.prod(self.stored.shape):
            return
        block = self.fp8.rows or rows, self.fp8.columns or columns
        dtype = self.factors.record.torch_dtype
        factor_rows, factor_columns = -(-rows // block[0]), -(-columns // block[1])
        row_bytes = factor_columns * dtype.itemsize
        step = max(1, _DECODED_ELEMENTS // columns)
        view = self.stored.view.detach()
        for matrix in range(math.prod(self.stored.shape[:-2])):
            for row in range(0, rows, step):
                count = min(step, rows - row)
                start = (matrix * rows + row) * columns
                first, last = row // block[0], (row + count - 1) // block[0]
                spans = (
                    self.values.span.cut(start, count * columns),
                    self.factors.span.cut(
                        (matrix * factor_rows + first) * row_bytes, (last - first + 1) * row_bytes
                    ),
                )

                def deliver(
                    parts: tuple[Tensor, ...], start: int = start, row: int = row, count: int = count
                ) -> None:
                    values = parts[0].view(torch.float8_e4m3fn).view(count, columns)
                    factors = parts[1].view(dtype).view(-1, factor_columns)
                    copy_range(view, start, decode_fp8(values, factors, block, row % block[0]).flatten())

                yield StagedPiece(spans, deliver)


@dataclass(frozen=True)
class Mxfp4Source:
    """Rows of 4-bit floats, two per byte, and one exponent per 32 of them."""

    stored: StoredTensor
    blocks: FileTensor
    exponents: FileTensor

    @property
    def tensors(self) -> dict[str, FileTensor]:
        """See `TensorSource`."""
        return {f"{self.stored.name}_blocks": self.blocks, f"{self.stored.name}_scales": self.exponents}

    def take(self, index: int) -> Mxfp4Source:
        """See `TensorSource`."""
        return Mxfp4Source(self.stored.take(index), self.blocks.take(index), self.exponents.take(index))

    def place(self, stored: StoredTensor) -> Mxfp4Source:
        """See `TensorSource`."""
        return replace(self, stored=stored)

    def find_misfits(self) -> Iterator[str]:
        """See `TensorSource`."""
        if self.stored.shape[-1] % MXFP4_GROUP:
            yield f"{self.stored.name} has shape {self.stored.shape}; rows of mxfp4 are multiples of {MXFP4_GROUP}"
            return
        expected = list_expected(self.stored, None)
        for name, tensor in self.tensors.items():
            if tensor.record.dtype != "U8":
                yield f"{name} is stored as {tensor.record.dtype}; mxfp4 needs U8"
            yield from _find_wrong_shape(name, tensor, expected[name])

    def iterate_pieces(self) -> Iterator[Piece]:
        """See `TensorSource`."""
        view = self.stored.view.detach()
        num_groups, step = view.numel() // MXFP4_GROUP, _DECODED_ELEMENTS // MXFP4_GROUP
        group_bytes = MXFP4_GROUP // 2
        for start in range(0, num_groups, step):
            count = min(step, num_groups - start)
            spans = (
                self.blocks.span.cut(start * group_bytes, count * group_bytes),
                self.exponents.span.cut(start, count),
            )

            def deliver(parts: tuple[Tensor, ...], start: int = start) -> None:
                copy_range(view, start * MXFP4_GROUP, decode_mxfp4(parts[0], parts[1]))

            yield StagedPiece(spans, deliver)


def copy_range(view: Tensor, start: int, values: Tensor) -> None:
    """Copies flat values over the elements of a view from ``start`` on, counted in its own order; casts."""
    if view.ndim <= 1:
        view.view(-1)[start : start + values.numel()].copy_(values)
        return
    row = math.prod(view.shape[1:])
    first, skipped = divmod(start, row)
    if skipped:
        head = min(row - skipped, values.numel())
        copy_range(view[first], skipped, values[:head])
        values, first = values[head:], first + 1
    whole = values.numel() // row
    view[first : first + whole].copy_(values[: whole * row].view(whole, *view.shape[1:]))
    if values.numel() % row:
        copy_range(view[first + whole], 0, values[whole * row :])


def _iterate_direct(view: Tensor, tensor: FileTensor) -> Iterator[DirectPiece]:
    offset, batch, batch_bytes = 0, [], 0
    for memory in _iterate_memory(view):
        if batch and (batch_bytes + len(memory) > PIECE_BYTES or len(batch) == _MAX_VIEWS):
            yield DirectPiece(tensor.span.cut(offset, batch_bytes), tuple(batch))
            offset, batch, batch_bytes = offset + batch_bytes, [], 0
        batch.append(memory)
        batch_bytes += len(memory)
    if batch:
        yield DirectPiece(tensor.span.cut(offset, batch_bytes), tuple(batch))


def _iterate_memory(view: Tensor) -> Iterator[memoryview]:
    """Yields the memory of a view in the order of its elements, in parts without gaps of at most `PIECE_BYTES`."""
    if not view.is_contiguous():
        for part in view:
            yield from _iterate_memory(part)
        return
    memory = view_bytes(view)
    for start in range(0, len(memory), PIECE_BYTES):
        yield memory[start : start + PIECE_BYTES]


def _count_run(view: Tensor) -> int:
    """Returns how many elements of a view follow each other in memory, at least."""
    count = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride()), strict=True):
        if size != 1 and stride != count:
            break
        count *= size
    return count


def _find_wrong_shape(name: str, tensor: FileTensor, expected: tuple[int, ...]) -> Iterator[str]:
    if tensor.record.shape != expected:
        yield f"{name} has shape {tensor.record.shape}, config.json asks for {expected}"


def _list_factors_names(name: str) -> tuple[str, ...]:
    """Returns what the factors of an FP8 tensor may be called, the usual name first.

    DeepSeek-V4 says ``X.scale`` and Mistral ``X.qscale_weight`` for what is elsewhere ``X.weight_scale_inv``; all three
    multiply.
    """
    others = (".scale", ".qscale_weight") if name.endswith(".weight") else ()
    return (f"{name}_scale_inv", *(name.removesuffix(".weight") + other for other in others))


def _factors_shape(shape: tuple[int, ...], fp8: Fp8Blocks) -> tuple[int, ...]:
    *matrices, rows, columns = shape
    if fp8.rows is None or fp8.columns is None:
        return tuple(matrices)
    return (*matrices, -(-rows // fp8.rows), -(-columns // fp8.columns))
