"""``tokenizer_config.json``: what of it moesys reads. Knows nothing of vocabularies or rendering."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from moesys.data.tokenizer_files import TOKENIZER_CONFIG_FILE, read_tokenizer_files
from moesys.errors import DataError

_SPECIAL_TOKENS_MAP_FILE = "special_tokens_map.json"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerConfig:
    """The keys as the files give them; empty where there is none."""

    special_tokens: dict[str, str] = field(default_factory=dict)
    """Names such as ``<s>`` by what they are for: ``bos_token``, ``eos_token``, ``pad_token`` …"""
    chat_template: object = None
    """Unchecked: who renders it says what it may be."""

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads the files of a folder. Raises `DataError` for one that is not a JSON object in UTF-8."""
        return cls.parse(read_tokenizer_files(folder), str(folder))

    @classmethod
    def parse(cls, files: Mapping[str, bytes], place: str) -> Self:
        """Reads files by name. ``special_tokens_map.json`` counts where the config is old and lists no added tokens, as
        for transformers. Raises like `load`."""
        keys = _parse_object(files, TOKENIZER_CONFIG_FILE, place)
        tokens = dict(keys)
        if "added_tokens_decoder" not in keys:
            tokens |= _parse_object(files, _SPECIAL_TOKENS_MAP_FILE, place)
        named = {kind: _name_token(tokens.get(kind)) for kind in _NAMED_TOKENS}
        return cls(
            {kind: name for kind, name in named.items() if name is not None}, keys.get("chat_template")
        )


def _parse_object(files: Mapping[str, bytes], name: str, place: str) -> dict[str, Any]:
    try:
        keys = json.loads(files.get(name, b"{}").decode())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}/{name}: not a JSON object in UTF-8 ({error}); repair it or remove it"
        ) from None
    if not isinstance(keys, dict):
        raise DataError(
            f"{place}/{name}: not a JSON object but {type(keys).__name__}; repair it or remove it"
        )
    return keys


def _name_token(token: object) -> str | None:
    """Returns the name of a token that is written as a name, or as an object that holds it as ``content``."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
