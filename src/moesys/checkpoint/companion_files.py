"""The small files of a model folder that go where its weights go: tokenizer, chat templates, generation config.

Knows names; does not know what the files say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moesys.data.tokenizer_files import read_tokenizer_files

GENERATION_CONFIG_FILE = "generation_config.json"

_OTHERS = (GENERATION_CONFIG_FILE, "LICENSE", "LICENSE.txt", "NOTICE")


def read_companion_files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of those that are there, by their names within the folder. Raises `DataError` for a
    tokenizer's file that cannot be read or is larger than any."""
    others = {name: (folder / name).read_bytes() for name in _OTHERS if (folder / name).is_file()}
    return {**read_tokenizer_files(folder), **others}


def select_tokenizer_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns those of the companion files that are the tokenizer's."""
    return {name: contents for name, contents in files.items() if name not in _OTHERS}
