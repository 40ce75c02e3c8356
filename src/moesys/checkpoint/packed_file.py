"""A packed file, opened: its header believed only where it is what its own config asks for.

Knows the file's bytes and where its tensors lie; loads nothing. Weights become sections with checksums, which whoever
reads them compares.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from moesys.checkpoint.expert_sections import ExpertSections
from moesys.checkpoint.hf import (
    check_num_layers,
    find_family,
    read_decoder_config,
    read_dtype,
    refusing_odd_sizes,
)
from moesys.checkpoint.model_files import describe_problems
from moesys.checkpoint.packed_header import PackedHeader, is_packed_header, parse_packed_header
from moesys.checkpoint.packed_outline import (
    EXPERTS_PREFIX,
    EXTENT_ALIGNMENT,
    FILES_PREFIX,
    PackedOutline,
    PackedTensor,
    list_files,
    make_outline,
    name_expert,
)
from moesys.checkpoint.safetensors_header import LENGTH_BYTES, parse_length
from moesys.errors import ModelFormatError
from moesys.kernels import Int8Product
from moesys.models import Family
from moesys.store import Extent, Section, StoredFile

_PACK = "moesys pack MODEL --to FILE"


@dataclass(frozen=True)
class PackedFile:
    """An open packed file; nothing but its header was read.

    identity:  which file it is.
    start:     of the first tensor, in bytes.
    """

    path: Path
    descriptor: int
    identity: StoredFile
    start: int
    header: PackedHeader

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each tensor begins in the file, in bytes."""
        offsets, offset = {}, self.start
        for name, record in self.header.tensors.items():
            offsets[name] = offset
            offset += record.size_bytes
        return offsets

    @property
    def family(self) -> Family:
        """Raises `ModelFormatError` for one that is not supported."""
        return find_family(self.header.config)

    @property
    def dtype(self) -> torch.dtype:
        """As which the model is computed. Raises `ModelFormatError` for one that is not supported."""
        return read_dtype(self.header.config)

    def make_outline(self, product: Int8Product = Int8Product.W8) -> PackedOutline:
        """Returns what the file holds. Raises `ModelFormatError` where its tensors are not those of its config."""
        keys = self.header.config
        check_num_layers(keys, self.header.tensors)
        config = read_decoder_config(self.path, self.family, keys)
        with refusing_odd_sizes(self.path):
            outline = make_outline(config, self.dtype, self.header.form, product)
        self._require_fit(outline)
        return outline

    def find_experts(self, outline: PackedOutline) -> ExpertSections:
        """Returns where each expert lies, of an outline that this file made."""
        extents = {layer_id: PackedTensor.expert(layout) for layer_id, layout in outline.layouts.items()}
        sections = {
            key: self._make_section(name_expert(key), f"layer {key[0]}, expert {key[1]}", extents[key[0]])
            for key in outline.expert_keys
        }
        return ExpertSections(sections, outline.layouts)

    def find_core(self, outline: PackedOutline) -> dict[str, Section]:
        """Returns where each weight lies that is no expert's, of an outline that this file made."""
        return {
            name: self._make_section(name, name, PackedTensor.whole(self.header.tensors[name]))
            for name in outline.core
        }

    def read_files(self) -> dict[str, bytes]:
        """Returns the small files of the model folder by their names in it. Raises `ModelFormatError` where they cannot
        be read or differ from their checksums."""
        return {
            name.removeprefix(FILES_PREFIX): self._read_file(name)
            for name in self.header.tensors
            if name.startswith(FILES_PREFIX)
        }

    def _read_file(self, name: str) -> bytes:
        size = self.header.tensors[name].size_bytes
        try:
            contents = os.pread(self.descriptor, size, self.offsets[name])
        except OSError as error:
            raise ModelFormatError(f"cannot read {self.path}: {error.strerror or error}") from None
        if self.header.checksums[name] != (zlib.crc32(contents),):
            raise ModelFormatError(
                f"{name} in {self.path} differs from its checksum; the file is damaged: {_PACK} --overwrite"
            )
        return contents

    def _make_section(self, tensor: str, name: str, packed: PackedTensor) -> Section:
        offset = self.offsets[tensor]
        extents = tuple(
            Extent(self.identity, offset + place.offset, place.num_bytes, part)
            for part, place in enumerate(packed.parts)
        )
        return Section(name, extents, self.header.checksums[tensor])

    def _require_fit(self, outline: PackedOutline) -> None:
        files = [
            (name.removeprefix(FILES_PREFIX), record.size_bytes)
            for name, record in self.header.tensors.items()
            if name.startswith(FILES_PREFIX)
        ]
        expected = {**dict(outline.list_tensors()), **dict(list_files(files))}
        found = self.header.tensors
        problems = [f"missing: {name}" for name in expected.keys() - found.keys()]
        problems += [f"not expected: {name}" for name in found.keys() - expected.keys()]
        for name in expected.keys() & found.keys():
            problems += self._find_misfits(name, expected[name])
        if problems:
            raise ModelFormatError(
                describe_problems(f"the tensors in {self.path} do not fit its config", sorted(problems))
            )

    def _find_misfits(self, name: str, expected: PackedTensor) -> Iterator[str]:
        found, wanted = self.header.tensors[name], expected.record
        if found != wanted:
            yield f"{name} is {found.dtype} {found.shape}, the config asks for {wanted.dtype} {wanted.shape}"
        num_checksums, num_parts = len(self.header.checksums[name]), len(expected.parts)
        if num_checksums != num_parts:
            yield f"{name} has {num_checksums} checksums for {num_parts} parts"
        if name.startswith(EXPERTS_PREFIX) and self.offsets[name] % EXTENT_ALIGNMENT:
            yield f"{name} begins at byte {self.offsets[name]}, which is no multiple of {EXTENT_ALIGNMENT}"


def is_packed_path(path: Path) -> bool:
    """Whether a user who names this path means a packed file and no model folder."""
    return path.is_file()


@contextmanager
def open_packed_file(path: Path) -> Iterator[PackedFile]:
    """Gives a packed file, open inside. Raises `ModelFormatError` for one that cannot be read, is damaged, or is
    none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        yield _read_header(path, descriptor)
    finally:
        os.close(descriptor)


def _read_header(path: Path, descriptor: int) -> PackedFile:
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        header_bytes = parse_length(os.pread(descriptor, LENGTH_BYTES, 0), status.st_size)
        contents = os.pread(descriptor, header_bytes, LENGTH_BYTES)
        if not is_packed_header(contents):
            raise ModelFormatError(
                f"{path} is no packed file of moesys; give the folder of a model, or a file that {_PACK} has written"
            )
        start = LENGTH_BYTES + header_bytes
        header = parse_packed_header(contents, status.st_size - start)
        return PackedFile(path, descriptor, StoredFile.identify(path, descriptor), start, header)
    except OSError as error:
        raise ModelFormatError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, ModelFormatError):
            raise
        raise ModelFormatError(f"{path} is no whole packed file: {error}") from None
