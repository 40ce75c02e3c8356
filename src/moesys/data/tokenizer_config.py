"""``tokenizer_config.json``: what of it moesys reads. Knows nothing of vocabularies or templates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from moesys.errors import DataError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class TokenizerConfig:
    """The keys as the file gives them; all None where there is no file."""

    bos_token: str | None = None
    eos_token: str | None = None
    chat_template: object = None
    """Unchecked: who renders it says what it may be."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads the file of a folder. Raises `DataError` for one that is not a JSON object in UTF-8."""
        file = folder / TOKENIZER_CONFIG_FILE
        if not file.is_file():
            return cls()
        try:
            keys = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not a JSON object in UTF-8 ({error}); repair it or remove it") from None
        if not isinstance(keys, dict):
            raise DataError(f"{file}: not a JSON object but {type(keys).__name__}; repair it or remove it")
        return cls(
            _name_token(keys.get("bos_token")), _name_token(keys.get("eos_token")), keys.get("chat_template")
        )


def _name_token(token: object) -> str | None:
    """Returns the name of a token that is written as a name, or as an object that holds it as ``content``."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
