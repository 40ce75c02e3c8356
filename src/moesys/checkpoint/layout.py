"""What the ``config.json`` of a model folder says of the model. Reads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesys.checkpoint.hf import find_family, read_config_file, read_decoder_config
from moesys.models import DecoderConfig, Family


@dataclass(frozen=True)
class FolderLayout:
    """The family and shape of a folder's model."""

    keys: dict[str, Any]
    """Of ``config.json``."""
    family: Family
    decoder: DecoderConfig


def read_layout(folder: Path) -> FolderLayout:
    """Reads ``config.json``. Raises `ModelFormatError` for a folder or family that is not supported."""
    keys = read_config_file(folder)
    family = find_family(keys)
    return FolderLayout(keys, family, read_decoder_config(folder / "config.json", family, keys))
