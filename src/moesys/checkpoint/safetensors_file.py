"""One safetensors file: written as a stream, read with suspicion.

Knows tensors, their header and a file's digest; knows nothing of checkpoints, models or shards. The idea:
tensors go to the disk one by one, wide dtypes first so that each is aligned, and a header is believed only
where it says exactly what the caller expects, without gaps, overlaps or more bytes than the file has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint.files import DEFAULT, FileSystem, HashedReader, WrittenFile
from moesys.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows."""

_ALIGNMENT_BYTES = 8
_METADATA_NAME = "__metadata__"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorRecord:
    """What a header says of a tensor: its dtype in safetensors' words, such as ``BF16``, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    files: FileSystem = DEFAULT,
) -> WrittenFile:
    """Writes tensors of any strides and device to a file that must not exist yet, and syncs it.

    Args:
        dtype: what every tensor is cast to; None keeps each one's own.
        metadata: text that goes into the header as ``__metadata__``.

    Needs memory for a copy of the largest tensor that is cast, not contiguous or not on the CPU. Raises
    CheckpointError for a name, dtype or layout that a file cannot hold, and DiskSpaceError when it does not
    fit; an unfinished file then stays.
    """
    records = {name: record_tensor(name, tensor, dtype) for name, tensor in tensors.items()}
    records = dict(sorted(records.items(), key=lambda item: item[1].torch_dtype.itemsize, reverse=True))
    header = _encode_header(records, metadata)
    size_bytes = len(header) + sum(record.size_bytes for record in records.values())
    return files.write_new_file(path, _iterate_chunks(header, records, tensors), size_bytes)


@dataclass(frozen=True)
class Selection:
    """Which tensors to load, as what, and where to.

    accepts:       says of a name whether its tensor is wanted; the others are hashed and not kept.
    dtype:         floating-point tensors are cast to it one at a time; None keeps theirs.
    destinations:  memory that exists already, by name; a tensor on the CPU that has the loaded one's dtype and
                   shape and no gaps is filled and returned. It is filled also from a file that turns out damaged.
    """

    accepts: Callable[[str], bool] = lambda name: True
    dtype: torch.dtype | None = None
    destinations: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def allocate(self, name: str, record: TensorRecord) -> torch.Tensor:
        """Returns the memory that a tensor is read into."""
        destination = self.destinations.get(name)
        if (
            destination is not None
            and destination.device.type == "cpu"
            and destination.is_contiguous()
            and (destination.dtype, tuple(destination.shape)) == (record.torch_dtype, record.shape)
        ):
            return destination
        return torch.empty(record.shape, dtype=record.torch_dtype)


EVERYTHING = Selection()


def read_safetensors(
    path: Path, written: WrittenFile, expected: Mapping[str, TensorRecord], selection: Selection = EVERYTHING
) -> dict[str, torch.Tensor]:
    """Reads a file once, hashing it on the way, and returns its tensors on the CPU in the file's order.

    Memory: the returned tensors, and one more where they are cast. Raises DamagedCheckpointError when size, digest
    or header differ from what was written.
    """
    tensors: dict[str, torch.Tensor] = {}
    with HashedReader(path, written) as reader:
        for name, record in _read_header(reader, expected).items():
            if not selection.accepts(name):
                reader.skip(record.size_bytes)
                continue
            tensor = selection.allocate(name, record)
            reader.read_into(_view_bytes(tensor))
            casts = selection.dtype is not None and tensor.is_floating_point()
            tensors[name] = tensor.to(selection.dtype) if casts else tensor
        reader.check_digest()
    return tensors


def verify_safetensors(path: Path, written: WrittenFile, expected: Mapping[str, TensorRecord]) -> None:
    """Raises what `read_safetensors` would raise; needs no memory for the tensors."""
    with HashedReader(path, written) as reader:
        _read_header(reader, expected)
        reader.check_digest()


def record_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> TensorRecord:
    """Returns how a tensor will be described in a header, cast to ``dtype`` unless that is None.

    Raises CheckpointError when a file cannot hold it under this name, in this dtype or layout.
    """
    dtype = dtype or tensor.dtype
    if name in ("", _METADATA_NAME):
        raise CheckpointError(f"a tensor cannot be named {name!r} in a safetensors file; rename it")
    if dtype not in _DTYPE_NAMES:
        raise CheckpointError(
            f"tensor {name} has dtype {dtype}, which moesys does not write to safetensors files; "
            f"convert it to one of {', '.join(map(str, _DTYPE_NAMES))}"
        )
    if tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"tensor {name} ({tensor.layout} on {tensor.device}) must be dense and have storage; "
            "materialise it before saving"
        )
    return TensorRecord(_DTYPE_NAMES[dtype], tuple(tensor.shape))


def parse_record(name: str, dtype: str, shape: Sequence[object]) -> TensorRecord:
    """Returns a record read from a file; raises ValueError when no tensor could look like this."""
    if dtype not in _DTYPES:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    sizes = tuple(parse_natural(f"shape of {name}", size) for size in shape)
    extent_bytes = _DTYPES[dtype].itemsize
    for size in sizes:
        extent_bytes *= max(size, 1)
        if extent_bytes >= 2**63:
            raise ValueError(f"{name} has a shape too large for any machine")
    return TensorRecord(dtype, sizes)


def parse_natural(what: str, value: object) -> int:
    """Returns a JSON value that must be a whole number from 0 to 2^63; raises ValueError otherwise."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"its {what} is {value!r}, not a whole number from 0 to 2^63")
    return value


def parse_object(contents: bytes) -> dict[str, Any]:
    """Returns the JSON object that a file should hold; raises ValueError when it holds something else."""
    try:
        parsed = json.loads(contents)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError("its JSON is not an object")
    return parsed


def _encode_header(records: Mapping[str, TensorRecord], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {_METADATA_NAME: dict(metadata)}
    offset = 0
    for name, record in records.items():
        end = offset + record.size_bytes
        entries[name] = {"dtype": record.dtype, "shape": record.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _iterate_chunks(
    header: bytes, records: Mapping[str, TensorRecord], tensors: Mapping[str, torch.Tensor]
) -> Iterator[memoryview | bytes]:
    yield header
    for name, record in records.items():
        yield _view_bytes(_as_stored(tensors[name].detach().resolve_neg(), record.torch_dtype))


def _as_stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor itself where its memory is what the file will hold, else a copy that is."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype == dtype:
        return tensor
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)


def _view_bytes(tensor: torch.Tensor) -> memoryview:
    # Not reshape: it keeps any stride where there is one element, and then the bytes cannot be viewed.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _read_header(reader: HashedReader, expected: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    """Reads a file up to its first tensor and returns the expected records in the order of the file."""
    try:
        if reader.left_bytes < 8:
            raise ValueError("it is too short for a header")
        header_bytes = int.from_bytes(reader.read(8), "little")
        limit = min(reader.left_bytes, MAX_HEADER_BYTES)
        if header_bytes > limit:
            raise ValueError(f"its header claims {header_bytes} bytes of at most {limit}")
        contents = parse_object(reader.read(header_bytes))
        records = _parse_header(contents, reader.left_bytes)
        if records != expected:
            raise ValueError("its header describes other tensors than were written")
    except ValueError as error:
        raise reader.damaged(str(error)) from error
    return records


def _parse_header(entries: Mapping[str, Any], payload_bytes: int) -> dict[str, TensorRecord]:
    """Returns the tensors of a safetensors header in the order of their bytes, which must leave no gap."""
    spans: list[tuple[int, int, str, TensorRecord]] = []
    for name, entry in entries.items():
        if name == _METADATA_NAME:
            continue
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]}:
                record = parse_record(name, dtype, shape)
                spans.append((parse_natural("offset", start), parse_natural("offset", end), name, record))
            case _:
                raise ValueError(f"its header has no dtype, shape and offsets for {name}")
    position = 0
    for start, end, name, record in sorted(spans, key=lambda span: span[:2]):
        if start != position or end - start != record.size_bytes:
            raise ValueError(
                f"{name} should lie at bytes {position} to {position + record.size_bytes}, "
                f"not {start} to {end}"
            )
        position = end
    if position != payload_bytes:
        raise ValueError(f"its tensors end at byte {position} of {payload_bytes}")
    return {name: record for _, _, name, record in sorted(spans, key=lambda span: span[:2])}
