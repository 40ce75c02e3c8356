"""The weight files of a model folder: which tensors they hold, and where each one's bytes lie.

Knows safetensors files and the index that names them; knows nothing of models. Nothing is believed: files must lie in
the folder, be regular, and agree with the index, and all that is wrong is told at once. Only headers are read here.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesys.checkpoint.json_object import parse_object
from moesys.checkpoint.safetensors_header import LENGTH_BYTES, TensorRecord, parse_header, parse_length
from moesys.errors import ModelFormatError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_MAX_JSON_BYTES = 100_000_000
_COMPARED_BYTES = 8 * 2**20
_MAX_PROBLEMS = 20
_FILE_PATTERN = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")


@dataclass(frozen=True)
class Span:
    """Bytes of an open file: what one tensor occupies, or a part of it."""

    path: Path
    descriptor: int
    offset: int
    num_bytes: int

    def cut(self, start: int, num_bytes: int) -> Span:
        """Returns ``num_bytes`` from byte ``start`` of this span on."""
        assert start >= 0
        assert start + num_bytes <= self.num_bytes
        return Span(self.path, self.descriptor, self.offset + start, num_bytes)

    def read(self) -> bytes:
        """Returns the bytes; raises `ModelFormatError` when the file cannot be read."""
        try:
            return os.pread(self.descriptor, self.num_bytes, self.offset)
        except OSError as error:
            raise ModelFormatError(f"cannot read {self.path}: {error.strerror or error}") from None


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file, not read yet."""

    record: TensorRecord
    span: Span

    def take(self, index: int) -> FileTensor:
        """Returns the part at ``index`` of the first dimension."""
        record = TensorRecord(self.record.dtype, self.record.shape[1:])
        return FileTensor(record, self.span.cut(index * record.size_bytes, record.size_bytes))


@contextmanager
def open_model_files(folder: Path) -> Iterator[Mapping[str, FileTensor]]:
    """Gives every tensor of a model folder by name; the files stay open inside.

    Raises `ModelFormatError` that lists what is wrong with the files and their index.
    """
    weight_map = _read_weight_map(folder)
    with ExitStack() as stack:
        by_file: dict[str, dict[str, FileTensor]] = {}
        problems: list[str] = []
        for name in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]:
            try:
                by_file[name] = stack.enter_context(_open_file(folder / name))
            except ModelFormatError as error:
                problems.append(str(error))
        problems += _find_conflicts(folder, by_file, weight_map or {})
        if problems:
            raise ModelFormatError(describe_problems(f"the weights in {folder} cannot be read", problems))
        yield {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}


def have_equal_bytes(one: FileTensor, other: FileTensor) -> bool:
    """Whether two tensors are the same in dtype, shape and every bit; reads both."""
    if one.record != other.record:
        return False
    for start in range(0, one.span.num_bytes, _COMPARED_BYTES):
        count = min(_COMPARED_BYTES, one.span.num_bytes - start)
        if one.span.cut(start, count).read() != other.span.cut(start, count).read():
            return False
    return True


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the keys of a JSON file; raises `ModelFormatError` for one that holds something else."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFormatError(
                f"{path} is larger than {_MAX_JSON_BYTES} bytes; it cannot be what it claims"
            )
        return parse_object(path.read_bytes())
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, ModelFormatError):
            raise
        raise ModelFormatError(f"{path} must hold a JSON object: {error}") from None


def describe_problems(summary: str, problems: Iterable[str]) -> str:
    """Returns one message of several problems: in the line of the summary where there is one, else a line each."""
    listed = list(problems)
    if len(listed) == 1:
        return f"{summary}: {listed[0]}"
    lines = listed[:_MAX_PROBLEMS]
    if len(listed) > _MAX_PROBLEMS:
        lines.append(f"and {len(listed) - _MAX_PROBLEMS} more")
    return "\n  ".join([f"{summary}:", *lines])


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    """Returns which file an index says to hold each tensor; None where one file holds all."""
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{path} must map tensors to files in a JSON object named weight_map")
    for name in weight_map.values():
        if not isinstance(name, str):
            raise ModelFormatError(
                f"{path} must map tensors to names of files in weight_map, not to {name!r}"
            )
        if not _FILE_PATTERN.fullmatch(name):
            raise ModelFormatError(
                f"{path} names the file {name!r}; shards must lie in its own folder and end in .safetensors"
            )
    if SINGLE_NAME not in weight_map.values() and (folder / SINGLE_NAME).exists():
        raise ModelFormatError(
            f"{folder} holds {SINGLE_NAME} and an index of other files, and they may differ; remove one of the two"
        )
    return weight_map


@contextmanager
def _open_file(path: Path) -> Iterator[dict[str, FileTensor]]:
    # A pipe with such a name would block in open; a link to a regular file is how the hub's cache looks.
    if not path.is_file():
        raise ModelFormatError(
            f"{path} is missing; the weights must be safetensors ({SINGLE_NAME}, or shards with {INDEX_NAME}); "
            ".bin files are pickles, which moesys never reads"
        )
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        yield _read_tensors(path, descriptor)
    finally:
        os.close(descriptor)


def _read_tensors(path: Path, descriptor: int) -> dict[str, FileTensor]:
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        header_bytes = parse_length(os.pread(descriptor, LENGTH_BYTES, 0), status.st_size)
        start = LENGTH_BYTES + header_bytes
        records = parse_header(os.pread(descriptor, header_bytes, LENGTH_BYTES), status.st_size - start)
        if sys.platform == "linux":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ModelFormatError(f"{path} is not a whole safetensors file: {error}") from None
    tensors = {}
    for name, record in records.items():
        tensors[name] = FileTensor(record, Span(path, descriptor, start, record.size_bytes))
        start += record.size_bytes
    return tensors


def _find_conflicts(
    folder: Path, by_file: Mapping[str, Mapping[str, FileTensor]], weight_map: Mapping[str, str]
) -> Iterator[str]:
    """Yields what the index and the files that could be opened contradict each other in."""
    holders: dict[str, str] = {}
    for file_name, tensors in by_file.items():
        for name in tensors:
            if name in holders:
                yield f"{name} lies in both {holders[name]} and {file_name}"
            holders[name] = file_name
    for name, file_name in weight_map.items():
        if file_name in by_file and name not in by_file[file_name]:
            holder = holders.get(name)
            elsewhere = "in no other file" if holder is None else f"in {holder}"
            yield f"{INDEX_NAME} says that {name} lies in {file_name}; it lies {elsewhere}"
