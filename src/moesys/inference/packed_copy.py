"""A packed copy of a model in a folder of the user's choice, made once and found again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from moesys.checkpoint import pack_model

_MODEL_FILES = ("config.json", "*.safetensors", "tokenizer*", "chat_template*", "generation_config.json")


def find_packed_copy(
    model: Path, folder: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Returns the packed copy of a model folder in ``folder``, made now where there is none of its files as they are.

    A model that is a packed file already is returned as it is. Raises what packing raises.
    """
    if model.is_file():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model.resolve().name}-{_digest_files(model)}.safetensors"
    if not path.exists():
        pack_model(model, path, on_progress=on_progress)
    return path


def _digest_files(model: Path) -> str:
    files = sorted({file for pattern in _MODEL_FILES for file in model.glob(pattern)})
    described = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:12]
