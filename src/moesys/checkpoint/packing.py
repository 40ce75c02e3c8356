"""A model folder packed into one file: every expert an aligned extent that is read as it is computed.

Knows folders and files; how weights pass from the one to the other is `ModulePacker`'s. Tokenizer, chat templates and
generation config come along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint.companion_files import read_companion_files
from moesys.checkpoint.files import DEFAULT, FileSystem
from moesys.checkpoint.hf import (
    UnreadModel,
    open_unread_model,
    read_config_file,
    read_decoder_config,
    read_dtype,
)
from moesys.checkpoint.module_packer import ModulePacker, PackedPart
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packed_header import PackedHeader
from moesys.checkpoint.packed_outline import FILES_PREFIX, list_files, make_outline
from moesys.checkpoint.packed_writer import write_packed_file
from moesys.checkpoint.quantization import QUANTIZATION_KEY
from moesys.checkpoint.weight_reader import WeightReader
from moesys.data.tokenizer_files import TOKENIZER_FILE
from moesys.errors import ConfigError


@dataclass(frozen=True)
class PackedModel:
    """What was written.

    dtype:         as which the model is computed, and its weights stored where they are not int8; routers excepted.
    source_dtype:  as which the folder's own config has it computed.
    num_bytes:     of the file.
    has_tokenizer: whether one came along.
    """

    path: Path
    family: str
    form: PackedForm
    dtype: torch.dtype
    source_dtype: torch.dtype
    num_bytes: int
    has_tokenizer: bool
    parts: tuple[PackedPart, ...]

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    @property
    def num_weight_bytes(self) -> int:
        """Of the file, without the header and the small files."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_weight_bytes / self.num_parameters

    @property
    def is_lossy(self) -> bool:
        """Whether weights were rounded to int8, or to a narrower dtype than the folder's."""
        return self.form is PackedForm.INT8 or self.dtype.itemsize < self.source_dtype.itemsize


def pack_model(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    form: PackedForm = PackedForm.FLOAT,
    *,
    overwrites: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    files: FileSystem = DEFAULT,
) -> PackedModel:
    """Writes the model in the folder ``source`` into the file ``target``.

    dtype: of weights that are not int8; None for the folder's own, to which quantised weights are decoded. form: int8
    is lossy, see `PackedForm`. overwrites: whether a file of that name is replaced. ``on_progress`` gets (bytes read,
    bytes to read).

    Memory: one expert or one other module, and some tens of MiB. Raises `ModelFormatError`, `ConfigError` or
    `CheckpointError`; ``target`` is then as it was.
    """
    _require_target(source, target, overwrites=overwrites)
    keys = read_config_file(source)
    with open_unread_model(source, dtype) as unread:
        outline = make_outline(unread.model.config, unread.dtype, form)
        companions = read_companion_files(source)
        tensors = dict(outline.list_tensors())
        tensors |= dict(list_files((name, len(contents)) for name, contents in companions.items()))
        header = PackedHeader(
            config=_settle_keys(keys, unread),
            form=form,
            tensors={name: tensor.record for name, tensor in tensors.items()},
            checksums={name: (0,) * len(tensor.parts) for name, tensor in tensors.items()},
        )
        with write_packed_file(target, header, tensors, files) as writer:
            reader = WeightReader(unread, on_progress)
            parts = ModulePacker(unread.model, outline, reader, writer, tensors).write_all()
            for name, contents in companions.items():
                writer.write_bytes(FILES_PREFIX + name, [contents])
    return PackedModel(
        path=target,
        family=unread.family.model_type,
        form=form,
        dtype=unread.dtype,
        source_dtype=read_dtype(keys),
        num_bytes=writer.num_bytes,
        has_tokenizer=TOKENIZER_FILE in companions,
        parts=parts,
    )


def _require_target(source: Path, target: Path, *, overwrites: bool) -> None:
    if source.resolve() in target.resolve().parents:
        raise ConfigError(f"{target} lies in the folder that is read, {source}; give another place with --to")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; give a file to write with --to")
    if not target.absolute().parent.is_dir():
        raise ConfigError(
            f"the folder of {target} does not exist; make it first, or give another place with --to"
        )
    if target.exists() and not overwrites:
        raise ConfigError(f"{target} exists; give another file with --to, or replace it with --overwrite")


def _settle_keys(keys: Mapping[str, Any], unread: UnreadModel) -> dict[str, Any]:
    """Returns the keys of ``config.json`` as they hold for the packed weights: decoded, of the dtype that was taken,
    with a head of its own where the files had one."""
    kept = {key: value for key, value in keys.items() if key not in (QUANTIZATION_KEY, "torch_dtype")}
    config = unread.model.config
    if config != read_decoder_config(unread.folder / "config.json", unread.family, keys):
        kept["tie_word_embeddings"] = config.tie_embeddings
    return kept | {"dtype": str(unread.dtype).removeprefix("torch.")}
