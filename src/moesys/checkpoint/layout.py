"""What the config of a model folder or packed file says of the model. Reads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesys.checkpoint.hf import find_family, read_config_file, read_decoder_config
from moesys.checkpoint.packed_file import is_packed_path, open_packed_file
from moesys.models import DecoderConfig, Family


@dataclass(frozen=True)
class FolderLayout:
    """The family and shape of a model."""

    keys: dict[str, Any]
    """Of ``config.json``."""
    family: Family
    decoder: DecoderConfig


def read_layout(path: Path) -> FolderLayout:
    """Reads the ``config.json`` of a folder, or the one in a packed file. Raises `ModelFormatError` for a model or
    family that is not supported."""
    if not is_packed_path(path):
        return read_folder_layout(path)
    with open_packed_file(path) as packed:
        keys = packed.header.config
    return _read_keys(path, keys)


def read_folder_layout(folder: Path) -> FolderLayout:
    """Reads the ``config.json`` of a folder. Raises `ModelFormatError` as `read_layout`, and for a packed file."""
    return _read_keys(folder / "config.json", read_config_file(folder))


def _read_keys(place: Path, keys: dict[str, Any]) -> FolderLayout:
    family = find_family(keys)
    return FolderLayout(keys, family, read_decoder_config(place, family, keys))
