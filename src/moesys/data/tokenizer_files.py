"""The files of a model folder that belong to its tokenizer, kept byte for byte.

A run and its export carry them along, so that other programs see the tokenizer and the chat templates that the model
was made with. Knows names and sizes; does not know what the files say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moesys.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATE_JSON_FILE = "chat_template.json"
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"

_NAMES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_JSON_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_MAX_FILE_BYTES = 256 * 2**20


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of the files that are there, by their names within the folder.

    Raises `DataError` for one that is larger than 256 MiB or cannot be read.
    """
    paths = [folder / name for name in _NAMES]
    if (folder / CHAT_TEMPLATE_FOLDER).is_dir():
        paths += sorted((folder / CHAT_TEMPLATE_FOLDER).glob("*.jinja"))
    return {path.relative_to(folder).as_posix(): _read(path) for path in paths if path.is_file()}


def write_tokenizer_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes the files into a folder, not synced; a folder or a file that is missing is made."""
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)


def _read(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise DataError(
                f"{path} has {size} bytes, more than {_MAX_FILE_BYTES}: no tokenizer's file is so large"
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); make it readable for this user"
        ) from error
