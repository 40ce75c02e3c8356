"""Keeps the names of special tokens in what people wrote from becoming these tokens, so that nobody can forge a turn.

Knows nothing of templates. The idea: a mark, which nobody can guess, is put inside every such name before a template
renders the text; the text is cut at the marks before it is encoded, so no tokenizer ever sees a whole name there.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from moesys.data.tokenizer import Tokenizer, TokenPlace


class ContentGuard:
    """Marks names in content, and encodes text that holds marked content."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._mark = f"break{secrets.token_hex(8)}"
        names = "|".join(map(re.escape, tokenizer.special_names)) or "(?!)"
        self._starts_of_names = re.compile(f"(?={names})(.)", re.DOTALL)

    def mark(self, value: Any) -> Any:
        """Returns a JSON value with a mark inside each name in its texts; keys of objects stay."""
        if isinstance(value, str):
            return self._starts_of_names.sub(rf"\1{self._mark}", value)
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.mark(item) for item in value)
        return value

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of rendered text without its marks."""
        pieces = text.split(self._mark)
        return [
            token_id for piece in pieces for token_id in self._tokenizer.encode_with_special_tokens(piece)
        ]

    def encode_with_places(self, text: str) -> list[TokenPlace]:
        """Returns the same tokens with their places in the text that was given, marks included."""
        tokens: list[TokenPlace] = []
        offset = 0
        for piece in text.split(self._mark):
            places = self._tokenizer.encode_with_places(piece)
            tokens += (
                [TokenPlace(p.token_id, p.start + offset, p.end + offset) for p in places]
                if offset
                else places
            )
            offset += len(piece) + len(self._mark)
        return tokens

    def remove_marks(self, text: str) -> str:
        """Returns text as people wrote it."""
        return text.replace(self._mark, "")
