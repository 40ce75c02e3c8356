"""A tokenizer and small corpora for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moesys.data import Document, PackedTokens, Tokenizer, pack_documents, train_tokenizer

TEXTS = [f"def function_{i}(x):\n        return x + {i}\n" * (1 + i % 7) for i in range(40)]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="session")
def pack(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str]], PackedTokens]:
    """Packs texts, in the order given."""
    cache_dir: Path = tmp_path_factory.mktemp("packed")

    def pack_texts(texts: list[str]) -> PackedTokens:
        return pack_documents([Document(str(i), t) for i, t in enumerate(texts)], tokenizer, cache_dir)

    return pack_texts


@pytest.fixture(scope="session")
def packed(pack: Callable[[list[str]], PackedTokens]) -> PackedTokens:
    return pack(TEXTS)
