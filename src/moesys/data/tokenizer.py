"""Byte-level BPE: text to token ids and back, without loss for any text.

The idea: one special token, end of text, which only the packer writes. The same characters inside a document
are ordinary text, so a corpus cannot forge a document boundary. Knows nothing of documents or token files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moesys.data.tokenizer_config import TokenizerConfig
from moesys.data.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_FOLDER,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    read_tokenizer_files,
    write_tokenizer_files,
)
from moesys.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# The end-of-text names of the model families that moesys reads, for a tokenizer.json that comes alone.
_KNOWN_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")

# The split of GPT-4 and Llama 3, under which a run of indentation is one piece. On Python's standard
# library it gives 3.66 bytes per token with 4096 tokens, GPT-2's split 3.61. Letting newline and indentation
# join the punctuation before them gives 3.90, but other runtimes (llama.cpp) do not know that split.
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenPlace(NamedTuple):
    """A token and where its text begins and ends, in characters."""

    token_id: int
    start: int
    end: int


class Tokenizer:
    """A ``tokenizers.Tokenizer`` that never reads special tokens out of text and never adds any."""

    def __init__(
        self, inner: tokenizers.Tokenizer, end_of_text: str, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Wraps `inner`, which must hold the token `end_of_text`. files: those it was read from, by name."""
        end_of_text_id = inner.token_to_id(end_of_text)
        if end_of_text_id is None:
            raise DataError(f"the tokenizer has no token '{end_of_text}'; name one that is in its vocabulary")
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._end_of_text = end_of_text
        self._files = dict(files or {})
        self.end_of_text_id: int = end_of_text_id
        """Starts every document; the target of the last token of the document before."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a ``tokenizer.json``, or the one in a folder; ``tokenizer_config.json`` beside it names the
        end-of-text token (``eos_token``), else it is recognised by its usual names.

        Raises:
            DataError: there is no such file, it cannot be parsed, or it has no end-of-text token.
        """
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"{file}: there is no such file; set data.tokenizer to a tokenizer.json or its folder, "
                "or leave it out to train a tokenizer on the corpus"
            )
        return cls.parse(read_tokenizer_files(file.parent) | {TOKENIZER_FILE: file.read_bytes()}, file)

    @classmethod
    def parse(cls, files: Mapping[str, bytes], file: Path) -> Self:
        """Reads a ``tokenizer.json`` among files, by name, that were read already.

        file: where it was found, for messages. Raises like `load`.
        """
        try:
            inner = tokenizers.Tokenizer.from_str(files[TOKENIZER_FILE].decode())
        except Exception as error:  # the Rust side raises plain Exception
            raise DataError(f"{file}: not a tokenizer.json that 'tokenizers' can read ({error})") from error
        declared = TokenizerConfig.parse(files, str(file.parent)).eos_token
        candidates = (declared,) if declared else _KNOWN_END_OF_TEXT
        for candidate in candidates:
            if inner.token_to_id(candidate) is not None:
                return cls(inner, candidate, files)
        raise DataError(
            f"{file}: no end-of-text token was found (looked for {', '.join(candidates)}); "
            "name one of its tokens as eos_token in a tokenizer_config.json beside it"
        )

    def render_files(self) -> dict[str, bytes]:
        """Returns the files, by name, from which transformers and `load` make this tokenizer again.

        What it was read from is returned as it was, chat templates included.
        """
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._end_of_text,
            "eos_token": self._end_of_text,
            "clean_up_tokenization_spaces": False,
        }
        return {
            TOKENIZER_FILE: self._inner.to_str(pretty=True).encode(),
            TOKENIZER_CONFIG_FILE: f"{json.dumps(config, indent=2)}\n".encode(),
            **self._files,
        }

    def save(self, folder: Path) -> None:
        """Writes the files into a folder, not synced; a folder or a file that is missing is made."""
        write_tokenizer_files(self.render_files(), folder)

    def with_chat_template(self, template: str) -> Self:
        """Returns the same tokenizer with one chat template in place of all that its files hold."""
        others = {
            name: file for name, file in self._files.items() if not name.startswith(CHAT_TEMPLATE_FOLDER)
        }
        files = others | {CHAT_TEMPLATE_FILE: template.encode()}
        return type(self)(self._inner, self._end_of_text, files)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of the text, without any special token."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Returns the token ids of trusted text, such as a rendered chat template, in which the names of special
        tokens stand for those tokens."""
        return self._encode_trusted(text).ids

    def encode_with_places(self, text: str) -> list[TokenPlace]:
        """Returns the tokens of `encode_with_special_tokens`, each with the part of the text that it stands for."""
        encoding = self._encode_trusted(text)
        return [
            TokenPlace(token_id, start, end)
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _encode_trusted(self, text: str) -> tokenizers.Encoding:
        self._inner.encode_special_tokens = False
        try:
            return self._inner.encode(text, add_special_tokens=False)
        finally:
            self._inner.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, using all cores."""
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text; special tokens appear by their names, incomplete characters as U+FFFD."""
        return self._inner.decode(list(token_ids), skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """The rows that an embedding needs: the largest token id plus one."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def special_names(self) -> tuple[str, ...]:
        """The names of the special tokens, which `encode` reads as ordinary text."""
        tokens = self._inner.get_added_tokens_decoder()
        return tuple(token.content for token in tokens.values() if token.special)

    @property
    def special_ids(self) -> frozenset[int]:
        """The special tokens."""
        tokens = self._inner.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in tokens.items() if token.special)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the token ids, hexadecimal."""
        content = f"{self._end_of_text}\n{self._inner.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE: end of text (id 0), the 256 bytes, then the most frequent merges.

    A corpus with fewer repeated pairs than asked for gives a smaller vocabulary.

    Raises:
        DataError: `vocab_size` is below 257.
    """
    if vocab_size < 257:
        raise DataError(
            f"vocab_size ({vocab_size}) must be at least 257: the 256 bytes and one end-of-text token"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, END_OF_TEXT)
