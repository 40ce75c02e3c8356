"""The header of a packed file: a safetensors header whose metadata says what the file is, with checksums of everything.

Knows bytes and JSON; knows nothing of models or of what tensors mean. The header carries a CRC-32 of itself, computed
with zeros in the place of its digits, so that a changed config or shape is noticed as a changed weight is. Its length
is a multiple of a page: behind it the first extent begins at one.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesys.checkpoint.json_object import parse_object
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packed_outline import EXTENT_ALIGNMENT
from moesys.checkpoint.safetensors_header import (
    LENGTH_BYTES,
    METADATA_NAME,
    TensorRecord,
    parse_header,
    parse_metadata,
)

FORMAT = "moesys-packed"
VERSION = "1"

_PREFIX = f'{{"{METADATA_NAME}":{{"header_crc32":"'.encode()
_DIGITS = slice(len(_PREFIX), len(_PREFIX) + 8)
_CHECKSUMS = re.compile(r"(?:[0-9a-f]{8})+")


@dataclass(frozen=True)
class PackedHeader:
    """What a packed file says of itself.

    config:     the keys of ``config.json``.
    tensors:    in the order of the file.
    checksums:  the CRC-32 of each part of each tensor, as `zlib.crc32` computes it.
    """

    config: dict[str, Any]
    form: PackedForm
    tensors: dict[str, TensorRecord]
    checksums: dict[str, tuple[int, ...]]

    def encode(self) -> bytes:
        """Returns the bytes before the first tensor; how many does not depend on the checksums' values."""
        checksums = {
            name: "".join(f"{value:08x}" for value in values) for name, values in self.checksums.items()
        }
        metadata = {
            "header_crc32": "0" * 8,
            "format": FORMAT,
            "version": VERSION,
            "weights": self.form.value,
            "config": json.dumps(self.config, ensure_ascii=False),
            "checksums": _dump(checksums),
        }
        entries: dict[str, Any] = {METADATA_NAME: metadata}
        offset = 0
        for name, record in self.tensors.items():
            end = offset + record.size_bytes
            entries[name] = {"dtype": record.dtype, "shape": record.shape, "data_offsets": [offset, end]}
            offset = end
        text = _dump(entries).encode()
        text += b" " * (-(LENGTH_BYTES + len(text)) % EXTENT_ALIGNMENT)
        return len(text).to_bytes(LENGTH_BYTES, "little") + _seal(text)


def is_packed_header(contents: bytes) -> bool:
    """Whether a safetensors header is one of a packed file, whole or not."""
    return contents.startswith(_PREFIX)


def parse_packed_header(contents: bytes, payload_bytes: int) -> PackedHeader:
    """Reads the JSON of a header. Raises ValueError for one that is damaged, of another version or no packed file's."""
    if not is_packed_header(contents) or _seal(contents) != contents:
        raise ValueError("its header differs from its checksum")
    tensors = parse_header(contents, payload_bytes)
    metadata = parse_metadata(contents)
    match metadata:
        case {"format": "moesys-packed", "version": version} if version != VERSION:
            raise ValueError(
                f"it is of version {version}, this moesys reads version {VERSION}; pack the model anew"
            )
        case {"format": "moesys-packed", "weights": form, "config": config, "checksums": checksums}:
            if form not in list(PackedForm):
                raise ValueError(f"its weights are {form!r}, this moesys knows {', '.join(PackedForm)}")
            return PackedHeader(
                parse_object(config.encode()), PackedForm(form), tensors, _parse_checksums(checksums, tensors)
            )
        case _:
            raise ValueError("its metadata lack the format, the config or the checksums")


def _parse_checksums(text: str, tensors: Mapping[str, TensorRecord]) -> dict[str, tuple[int, ...]]:
    found = parse_object(text.encode(), is_strict=True)
    if found.keys() != tensors.keys():
        raise ValueError("its checksums are not those of its tensors")
    checksums = {}
    for name, digits in found.items():
        if not isinstance(digits, str) or not _CHECKSUMS.fullmatch(digits):
            raise ValueError(f"its checksums of {name} are no numbers of 8 digits")
        checksums[name] = tuple(int(digits[i : i + 8], 16) for i in range(0, len(digits), 8))
    return checksums


def _seal(text: bytes) -> bytes:
    """Returns a header with its own checksum in it."""
    blank = text[: _DIGITS.start] + b"0" * 8 + text[_DIGITS.stop :]
    return text[: _DIGITS.start] + f"{zlib.crc32(blank):08x}".encode() + text[_DIGITS.stop :]


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
