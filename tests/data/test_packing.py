"""The stream's layout, and the cache that holds it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moesys.data import Document, PackedTokens, Tokenizer, pack_documents
from moesys.errors import DataError

DOCUMENTS = [Document("a", "return x"), Document("b", "été <|endoftext|>"), Document("c", "x = 1\n" * 9)]


@given(texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5))
def test_stream_is_end_of_text_then_document(
    pack: Callable[[list[str]], PackedTokens], tokenizer: Tokenizer, texts: list[str]
) -> None:
    packed = pack(texts)
    end = tokenizer.end_of_text_id
    expected = [t for text in texts for t in (end, *tokenizer.encode(text))] + [end]
    assert packed.tokens.tolist() == expected
    assert np.flatnonzero(packed.tokens == end).tolist() == packed.document_starts.tolist()
    assert packed.document_bytes.tolist() == [len(text.encode()) for text in texts]
    assert packed.num_documents == len(texts)
    assert packed.num_tokens == len(expected)
    assert packed.num_bytes == sum(len(text.encode()) for text in texts)
    assert packed.tokens.dtype == np.uint16
    assert packed.document_starts.dtype == np.int64


def test_documents_are_tokenised_in_groups(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pack_documents(DOCUMENTS, tokenizer, tmp_path / "whole")
    monkeypatch.setattr("moesys.data.packing._BATCH_CHARACTERS", 10)
    assert np.array_equal(pack_documents(DOCUMENTS, tokenizer, tmp_path / "groups").tokens, whole.tokens)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(65537)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    packed = pack_documents([Document("a", "w65536 w2")], Tokenizer(inner, "w1"), tmp_path)
    assert packed.tokens.dtype == np.uint32
    assert packed.tokens.tolist() == [1, 65536, 2, 1]


def test_second_call_does_not_tokenise(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack_documents(DOCUMENTS, tokenizer, tmp_path)

    def refuse(self: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)
    second = pack_documents(DOCUMENTS, tokenizer, tmp_path)
    assert np.array_equal(first.tokens, second.tokens)
    assert second.names == ("a", "b", "c")
    with pytest.raises(AssertionError, match="tokenised again"):
        pack_documents(DOCUMENTS[:2], tokenizer, tmp_path)


@pytest.mark.parametrize("file", ["tokens.bin", "index.json", "document_starts.npy"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
def test_damaged_entry_is_rebuilt_loudly(
    file: str, damage: str, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pack_documents(DOCUMENTS, tokenizer, tmp_path).tokens.tolist()
    (entry,) = tmp_path.iterdir()
    content = (entry / file).read_bytes()
    (entry / file).unlink()
    if damage != "remove":
        (entry / file).write_bytes(content[:-2] if damage == "truncate" else b"")
    with pytest.raises(DataError, match=r"the packed corpus is damaged \(.*delete the folder"):
        PackedTokens.open(entry)
    with caplog.at_level(logging.WARNING):
        assert pack_documents(DOCUMENTS, tokenizer, tmp_path).tokens.tolist() == expected
    assert "built again" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [entry.name]


def test_verify_finds_a_changed_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pack_documents(DOCUMENTS, tokenizer, tmp_path)
    (entry,) = tmp_path.iterdir()
    PackedTokens.open(entry, verify=True)
    content = bytearray((entry / "tokens.bin").read_bytes())
    content[2] ^= 1
    (entry / "tokens.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"SHA-256 of tokens.bin differs"):
        PackedTokens.open(entry, verify=True)


@pytest.mark.parametrize("file", ["tokens.bin", "document_starts.npy"])
def test_an_entry_with_one_flipped_bit_is_rebuilt(
    file: str, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed = pack_documents(DOCUMENTS, tokenizer, tmp_path)
    expected = packed.tokens.tolist(), packed.document_starts.tolist()
    (entry,) = tmp_path.iterdir()
    content = bytearray((entry / file).read_bytes())
    content[-12 if file.endswith(".npy") else 2] ^= 1
    (entry / file).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = pack_documents(DOCUMENTS, tokenizer, tmp_path)
    assert "built again" in caplog.text
    assert (found.tokens.tolist(), found.document_starts.tolist()) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_entry_is_on_the_disk_before_it_has_its_name(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, rename, log = os.fsync, os.rename, []

    def log_fsync(descriptor: int) -> None:
        log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def log_rename(source: Path, target: Path) -> None:
        log.append(("rename", target))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    pack_documents(DOCUMENTS, tokenizer, tmp_path)
    (entry,) = tmp_path.iterdir()
    *synced, named, parent = log
    assert (named, parent) == (("rename", entry), tmp_path)
    assert {path.name for path in synced} == {*(file.name for file in entry.iterdir()), entry.name}


def test_a_cache_that_cannot_be_written_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        DataError, match=r"the cache entry .*/cache/.* cannot be written \(.*set MOESYS_CACHE"
    ):
        pack_documents(DOCUMENTS, tokenizer, tmp_path / "cache")


def test_failed_build_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "encode_batch", fail)
    with pytest.raises(KeyboardInterrupt):
        pack_documents(DOCUMENTS, tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_entry_built_by_another_rank_meanwhile_is_used(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_batch = Tokenizer.encode_batch

    def race(self: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)
        pack_documents(DOCUMENTS, tokenizer, tmp_path)
        return encode_batch(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", race)
    assert pack_documents(DOCUMENTS, tokenizer, tmp_path).num_documents == 3
    assert len(list(tmp_path.iterdir())) == 1
