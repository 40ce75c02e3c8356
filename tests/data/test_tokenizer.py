"""Round trips, special tokens in text, files and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moesys.data import Tokenizer, train_tokenizer
from moesys.errors import DataError


@given(
    text=st.text()
    | st.lists(st.sampled_from(["<|endoftext|>", " ", "\n", "\t", "x", "é", "\r\n"])).map("".join)
)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.encode_batch([text, "x"])[0] == token_ids
    assert tokenizer.end_of_text_id not in token_ids


def test_vocabulary_is_end_of_text_bytes_and_merges(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 300
    assert tokenizer.end_of_text_id == 0
    assert tokenizer.decode([0]) == "<|endoftext|>"
    assert train_tokenizer(["ab"], 257).vocab_size == 257
    with pytest.raises(DataError, match=r"vocab_size \(256\) must be at least 257"):
        train_tokenizer(["ab"], 256)


def test_indentation_is_not_one_token_per_space(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("\n        return")) <= 4


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    texts = [f"def function_{i}(x):\n        return x + {i}\n" * (1 + i % 7) for i in range(40)]
    assert train_tokenizer(iter(texts), 300).fingerprint == tokenizer.fingerprint
    assert train_tokenizer(texts, 299).fingerprint != tokenizer.fingerprint


def test_saved_tokenizer_loads_from_folder_and_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("a <|endoftext|> b") == tokenizer.encode("a <|endoftext|> b")
        assert loaded.end_of_text_id == 0


def test_transformers_loads_the_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n        return  'é' .\n"
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.decode(theirs.encode(text)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.end_of_text_id


def test_end_of_text_is_declared_or_recognised(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.add_special_tokens(["<s>", "<stop>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"no end-of-text token was found .*name one of its tokens as eos_token"
    ):
        Tokenizer.load(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for declared in ("<stop>", {"content": "<stop>", "lstrip": False}):
        config.write_text(json.dumps({"eos_token": declared}))
        assert Tokenizer.load(tmp_path).end_of_text_id == inner.token_to_id("<stop>")
    config.write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config.json: not a JSON object"):
        Tokenizer.load(tmp_path)
    config.unlink()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).end_of_text_id == inner.token_to_id("</s>")


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.json: there is no such file; set data.tokenizer to"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer.json that 'tokenizers' can read"):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_of_a_loaded_file_are_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("return x") == tokenizer.encode("return x")
