"""Reads one file of text, JSONL or Parquet, or one Hugging Face dataset, into documents.

Knows nothing of folders, splits or tokens. Text is UTF-8, taken byte for byte: no newline is translated.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from moesys.errors import DataError, MissingExtraError


@dataclass(frozen=True)
class Document:
    """One text that is never mixed with another: it starts with an end-of-text token of its own."""

    name: str
    text: str

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: Path, name: str) -> Iterator[Document]:
    """Yields the whole file as one document."""
    yield Document(name, decode_utf8(read_bytes(path), path))


def read_jsonl(path: Path, name: str, text_field: str) -> Iterator[Document]:
    """Yields the field ``text_field`` of every line; blank lines are skipped."""
    for number, line in enumerate(decode_utf8(read_bytes(path), path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        text = _require_text(parse_json_line(line, place), text_field, place)
        yield Document(f"{name}:{number}", text)


def parse_json_line(line: str, place: str) -> dict[str, Any]:
    """Returns the object of a line of JSONL; raises `DataError` that names the place."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: the line is not JSON ({error.msg} at column {error.colno}); "
            "a JSONL file holds one JSON object per line; use data.format=text to read it as plain text"
        ) from error
    except RecursionError:
        raise DataError(f"{place}: the line's JSON is nested too deeply to be read; remove it") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected a JSON object, got {type(record).__name__}")
    return record


def read_parquet(path: Path, name: str, text_field: str) -> Iterator[Document]:
    """Yields the column ``text_field`` of every row.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    parquet = _import_extra("pyarrow.parquet", "pyarrow", "reading a Parquet file")
    arrow = _import_extra("pyarrow", "pyarrow", "reading a Parquet file")
    try:
        with parquet.ParquetFile(path) as file:
            _require_column(file.schema_arrow.names, text_field, str(path))
            row = 0
            for batch in file.iter_batches(columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    text = _require_text({text_field: value}, text_field, f"{path}: row {row}")
                    yield Document(f"{name}:{row}", text)
                    row += 1
    except (OSError, arrow.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet ({error}); check the file or data.format"
        ) from error


def read_hugging_face(dataset_name: str, text_field: str) -> Iterator[Document]:
    """Yields the column ``text_field`` of the split ``train`` of a dataset on the Hugging Face hub.

    Args:
        dataset_name: ``NAME`` or ``NAME:CONFIG``, such as ``wikitext:wikitext-2-raw-v1``.
        text_field: the column.

    Raises:
        MissingExtraError: ``datasets`` is not installed.
    """
    datasets = _import_extra("datasets", "datasets", f"reading hf:{dataset_name}")
    path, _, subset = dataset_name.partition(":")
    try:
        dataset = datasets.load_dataset(path, name=subset or None, split="train")
    except (OSError, ValueError) as error:
        raise DataError(
            f"hf:{dataset_name}: the dataset cannot be loaded ({error}); "
            "check its name (hf:NAME, or hf:NAME:CONFIG where it has several), its split 'train' and the network"
        ) from error
    _require_column(dataset.column_names, text_field, f"hf:{dataset_name}")
    for row, record in enumerate(dataset.select_columns([text_field])):
        place = f"hf:{dataset_name}: row {row}"
        yield Document(f"{dataset_name}:{row}", _require_text(record, text_field, place))


def read_bytes(path: Path) -> bytes:
    """Returns a file's content; an operating-system error becomes a `DataError` that names the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); "
            "make it readable for this user, or give a source without it"
        ) from error


def decode_utf8(content: bytes, path: Path) -> str:
    """Returns the text, or raises a `DataError` with the offset of the first byte that is not text."""
    zero_offset = content.find(0)
    if zero_offset >= 0:
        raise DataError(_describe_binary(path, zero_offset, "a zero byte, so it is a binary file"))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        cause = f"0x{content[error.start]:02x}, which is not UTF-8"
        raise DataError(_describe_binary(path, error.start, cause)) from error


def _describe_binary(path: Path, offset: int, cause: str) -> str:
    return (
        f"{path}: byte {offset} is {cause}; text must be UTF-8: convert the file (iconv -t UTF-8), "
        "or, in a folder, move it out or give it an ending that is not read as text"
    )


def _require_column(names: Iterable[str], text_field: str, place: str) -> None:
    if text_field not in names:
        raise DataError(
            f"{place}: there is no column '{text_field}'; set data.text_field to one of: {', '.join(names)}"
        )


def _require_text(record: dict[str, object], text_field: str, place: str) -> str:
    if text_field not in record:
        raise DataError(
            f"{place}: there is no field '{text_field}'; "
            f"set data.text_field to one of: {', '.join(record) or '(none)'}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{place}: the field '{text_field}' must be text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: character {error.start} of the field '{text_field}' is a lone surrogate "
            f"(\\u{ord(text[error.start]):04x}), which UTF-8 cannot hold; repair or remove the record"
        ) from error
    return text


def _import_extra(module: str, package: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, "data", purpose) from error
