"""A digest that tells whether a model's files are what they were: all that a text depends on, and all that is packed.

Small files count by their contents. Weights count by name, size and time of change: reading them would take as long as
loading them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from moesys.checkpoint.companion_files import read_companion_files
from moesys.checkpoint.packed_file import is_packed_path

_CONFIGS = ("config.json", "*.safetensors.index.json")


def digest_model(model: Path) -> str:
    """Returns 16 hexadecimal digits for a model folder or a packed file. Raises `DataError` for a tokenizer's file that
    cannot be read."""
    if is_packed_path(model):
        weights, small = [model], {}
    else:
        weights = sorted(model.glob("*.safetensors"))
        configs = {file.name: file.read_bytes() for name in _CONFIGS for file in model.glob(name)}
        small = read_companion_files(model) | configs
    described = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
    digest = hashlib.sha256(repr((described, sorted(small.items()))).encode())
    return digest.hexdigest()[:16]
