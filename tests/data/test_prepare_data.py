"""From a configuration to packed tokens, and what the cache and the fingerprint notice."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from moesys.config import DataConfig
from moesys.data import Tokenizer, prepare_data
from moesys.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i} says hello " * 5)
    return folder


def configure(corpus: Path, **settings: object) -> DataConfig:
    values = {"source": str(corpus), "sequence_length": 16, "vocab_size": 280, "heldout_fraction": 0.2}
    return DataConfig.model_validate(values | settings)


def test_both_sides_cover_the_corpus(corpus: Path, tmp_path: Path) -> None:
    data = prepare_data(configure(corpus), tmp_path / "cache")
    assert data.train.num_documents + data.heldout.num_documents == 30
    assert not set(data.train.names) & set(data.heldout.names)
    assert data.train.num_bytes + data.heldout.num_bytes == sum(f.stat().st_size for f in corpus.iterdir())
    assert "30 documents" in data.description
    assert "\n" not in data.description
    assert len(data.fingerprint) == 64


def test_unchanged_content_is_read_from_the_cache(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_data(configure(corpus), tmp_path / "cache")

    def refuse(*_: object) -> None:
        raise AssertionError("worked again")

    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)
    monkeypatch.setattr("moesys.data.prepare.train_tokenizer", refuse)
    second = prepare_data(configure(corpus), tmp_path / "cache")
    assert second.fingerprint == first.fingerprint
    assert second.train.tokens.tolist() == first.train.tokens.tolist()
    with pytest.raises(AssertionError, match="worked again"):
        prepare_data(configure(corpus, vocab_size=281), tmp_path / "cache")


def test_fingerprint_follows_content_and_not_names(corpus: Path, tmp_path: Path) -> None:
    def fingerprint(**settings: object) -> str:
        return prepare_data(configure(corpus, **settings), tmp_path / "cache").fingerprint

    before = fingerprint()
    (corpus / "3.txt").rename(corpus / "renamed.md")
    assert fingerprint() == before
    assert fingerprint(vocab_size=270) != before
    assert fingerprint(heldout_fraction=0.5) != before
    (corpus / "4.txt").write_text("document four says something else")
    assert fingerprint() != before


def test_given_tokenizer_is_used(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "given")
    data = prepare_data(configure(corpus, tokenizer=str(tmp_path / "given")), tmp_path / "cache")
    assert data.tokenizer.fingerprint == tokenizer.fingerprint


def test_a_tokenizer_that_is_handed_over_wins_and_none_is_trained(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesys.data.prepare.train_tokenizer", pytest.fail)
    for more in ({}, {"tokenizer": str(tmp_path / "gone")}):
        data = prepare_data(configure(corpus, **more), tmp_path / "cache", tokenizer)
        assert data.tokenizer is tokenizer


def test_damaged_tokenizer_in_the_cache_is_trained_again(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = prepare_data(configure(corpus), tmp_path / "cache").fingerprint
    (file,) = (tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json")
    file.write_text(file.read_text()[:-100])
    with caplog.at_level(logging.WARNING):
        assert prepare_data(configure(corpus), tmp_path / "cache").fingerprint == before
    assert "built again" in caplog.text


def test_corpus_too_small_for_the_sequence_length(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"sequence_length 100000 needs 100001 training tokens, the corpus has"
    ):
        prepare_data(configure(corpus, sequence_length=100000), tmp_path / "cache")


def test_one_file_is_split_into_head_and_tail(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i:3d}\n" for i in range(100)))
    data = prepare_data(configure(book, heldout_fraction=0.05), tmp_path / "cache")
    assert (data.train.num_bytes, data.heldout.num_bytes) == (95 * 9, 5 * 9)
    assert data.description.endswith("one document: its last 5 % held out")


def test_a_file_of_one_character_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(DataError, match="at least 2 characters, got 1"):
        prepare_data(configure(tmp_path / "short.txt"), tmp_path / "cache")
