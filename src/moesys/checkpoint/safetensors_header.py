"""The header of a safetensors file: what it says of each tensor, believed only where nothing else could be meant.

Knows bytes and JSON; knows nothing of files, models or checkpoints. The rules are the format's own: tensors lie behind
the header without gap or overlap, in a dtype and shape that give their number of bytes, and fill the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from moesys.checkpoint.json_object import parse_natural, parse_object

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows."""

LENGTH_BYTES = 8
"""What a file begins with: the header's length, little-endian."""

METADATA_NAME = "__metadata__"
"""The entry of a header that is text about the file and no tensor."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorRecord:
    """What a header says of a tensor: its dtype in safetensors' words, such as ``BF16``, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Returns the record of a tensor, which may lie on the meta device; raises KeyError for a dtype that files do
        not have."""
        return cls(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


def parse_length(contents: bytes, file_bytes: int) -> int:
    """Returns the header's length from the first bytes of a file; raises ValueError when the file cannot hold it."""
    if len(contents) < LENGTH_BYTES:
        raise ValueError("it is too short for a header")
    header_bytes = int.from_bytes(contents[:LENGTH_BYTES], "little")
    limit = min(file_bytes - LENGTH_BYTES, MAX_HEADER_BYTES)
    if header_bytes > limit:
        raise ValueError(f"its header claims {header_bytes} bytes of at most {limit}")
    return header_bytes


def parse_header(contents: bytes, payload_bytes: int) -> dict[str, TensorRecord]:
    """Returns the tensors of a header in the order of their bytes, which follow each other from byte 0 of the payload.

    Raises ValueError for a header that is not JSON of the format's form, or whose tensors leave gaps, overlap or do
    not end where the file does.
    """
    if not contents.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    spans: list[tuple[int, int, str, TensorRecord]] = []
    for name, entry in parse_object(contents, is_strict=True).items():
        if name == METADATA_NAME:
            _check_metadata(entry)
            continue
        name.encode()
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]}:
                record = parse_record(name, dtype, shape)
                spans.append((parse_natural("offset", start), parse_natural("offset", end), name, record))
            case _:
                raise ValueError(f"its header has no dtype, shape and offsets for {name}")
    spans.sort(key=lambda span: span[:2])
    position = 0
    for start, end, name, record in spans:
        if start != position or end - start != record.size_bytes:
            raise ValueError(
                f"{name} should lie at bytes {position} to {position + record.size_bytes}, "
                f"not {start} to {end}"
            )
        position = end
    if position != payload_bytes:
        raise ValueError(f"its tensors end at byte {position} of {payload_bytes}")
    return {name: record for _, _, name, record in spans}


def parse_metadata(contents: bytes) -> dict[str, str]:
    """Returns the texts about the file of a header that `parse_header` takes; none where it has none."""
    return parse_object(contents, is_strict=True).get(METADATA_NAME, {})


def parse_record(name: str, dtype: str, shape: Sequence[object]) -> TensorRecord:
    """Returns a record read from a file; raises ValueError when no tensor could look like this."""
    if dtype not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    sizes = tuple(parse_natural(f"shape of {name}", size) for size in shape)
    extent_bytes = DTYPES[dtype].itemsize
    for size in sizes:
        extent_bytes *= max(size, 1)
        if extent_bytes >= 2**63:
            raise ValueError(f"{name} has a shape too large for any machine")
    return TensorRecord(dtype, sizes)


def _check_metadata(entry: object) -> None:
    match entry:
        case Mapping() if all(isinstance(value, str) for value in entry.values()):
            return
        case _:
            raise ValueError(f"its {METADATA_NAME} is not an object of texts")
