"""One safetensors file: written as a stream, read with suspicion.

Knows tensors, their header and a file's digest; knows nothing of checkpoints, models or shards. The idea:
tensors go to the disk one by one, wide dtypes first so that each is aligned, and a header is believed only
where it says exactly what the caller expects, without gaps, overlaps or more bytes than the file has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint.files import DEFAULT, FileSystem, HashedReader, WrittenFile
from moesys.checkpoint.safetensors_header import (
    DTYPES,
    LENGTH_BYTES,
    METADATA_NAME,
    TensorRecord,
    parse_header,
    parse_length,
)
from moesys.errors import CheckpointError

_ALIGNMENT_BYTES = 8
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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

    def copy_tensor(name: str) -> Iterator[memoryview]:
        yield view_bytes(_as_stored(tensors[name].detach().resolve_neg(), records[name].torch_dtype))

    return write_chunks(path, records, copy_tensor, metadata=metadata, files=files)


def write_chunks(
    path: Path,
    records: Mapping[str, TensorRecord],
    iterate_chunks: Callable[[str], Iterable[memoryview]],
    *,
    metadata: Mapping[str, str] | None = None,
    files: FileSystem = DEFAULT,
) -> WrittenFile:
    """Writes tensors that come in chunks to a file that must not exist yet, and syncs it.

    iterate_chunks: gives the bytes of a named tensor in order; called once per tensor, wide dtypes first, and no
    chunk is held when the next is asked for.
    """
    ordered = dict(sorted(records.items(), key=lambda item: item[1].torch_dtype.itemsize, reverse=True))
    header = _encode_header(ordered, metadata)
    size_bytes = len(header) + sum(record.size_bytes for record in ordered.values())
    return files.write_new_file(path, _chain_chunks(header, ordered, iterate_chunks), size_bytes)


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
            reader.read_into(view_bytes(tensor))
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
    if name in ("", METADATA_NAME):
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


def _encode_header(records: Mapping[str, TensorRecord], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {METADATA_NAME: dict(metadata)}
    offset = 0
    for name, record in records.items():
        end = offset + record.size_bytes
        entries[name] = {"dtype": record.dtype, "shape": record.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _chain_chunks(
    header: bytes, names: Iterable[str], iterate_chunks: Callable[[str], Iterable[memoryview]]
) -> Iterator[bytes | memoryview]:
    yield header
    for name in names:
        yield from iterate_chunks(name)


def _as_stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor itself where its memory is what the file will hold, else a copy that is."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype == dtype:
        return tensor
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a tensor that lies on the CPU without gaps."""
    # Not reshape: it keeps any stride where there is one element, and then the bytes cannot be viewed.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _read_header(reader: HashedReader, expected: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    """Reads a file up to its first tensor and returns the expected records in the order of the file."""
    try:
        file_bytes = reader.left_bytes
        header_bytes = parse_length(reader.read(min(LENGTH_BYTES, file_bytes)), file_bytes)
        records = parse_header(reader.read(header_bytes), reader.left_bytes)
        if records != expected:
            raise ValueError("its header describes other tensors than were written")
    except ValueError as error:
        raise reader.damaged(str(error)) from error
    return records
