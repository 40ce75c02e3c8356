"""A model folder as what it takes to write text: the decoder and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint.hf import load_model, read_config_file
from moesys.checkpoint.model_files import read_json_object
from moesys.data import Tokenizer
from moesys.errors import ModelFormatError
from moesys.models import Decoder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TextTools:
    """What turns text into a folder's tokens and back.

    stop_ids: tokens that end a text: the tokenizer's end of text, and those that the folder's configs name.
    """

    folder: Path
    tokenizer: Tokenizer
    stop_ids: frozenset[int]

    def require_fit(self, vocab_size: int) -> None:
        """Raises `ModelFormatError` when a model embeds fewer tokens than there are."""
        if self.tokenizer.vocab_size > vocab_size:
            raise ModelFormatError(
                f"the tokenizer in {self.folder} has {self.tokenizer.vocab_size} tokens, the model embeds "
                f"{vocab_size}; they do not belong together"
            )


@dataclass(frozen=True)
class TextModel:
    """A decoder that fits its tokenizer."""

    decoder: Decoder
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """See `TextTools`."""


def read_text_tools(folder: Path) -> TextTools:
    """Reads the tokenizer of a Hugging Face folder. Raises `ModelFormatError` or `DataError`."""
    config = read_config_file(folder)
    tokenizer = Tokenizer.load(folder)
    return TextTools(folder, tokenizer, _read_stop_ids(folder, config) | {tokenizer.end_of_text_id})


def load_text_model(
    folder: Path,
    dtype: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextModel:
    """Loads a Hugging Face folder.

    dtype: ``fp32``, ``bf16`` or None for the stored one. ``on_progress`` gets (bytes read, bytes to read).

    Raises `ModelFormatError` or `DataError`.
    """
    weights_dtype = None if dtype is None else parse_dtype(dtype)
    tools = read_text_tools(folder)
    decoder = load_model(folder, weights_dtype, on_progress)
    tools.require_fit(decoder.config.vocab_size)
    return TextModel(decoder, tools.tokenizer, tools.stop_ids)


def _read_stop_ids(folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """Returns ``eos_token_id``, a number or a list, of ``generation_config.json``, else of ``config.json``."""
    path = folder / "generation_config.json"
    generation = read_json_object(path) if path.exists() else {}
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ModelFormatError(
            f"eos_token_id in {folder} must be a token id or a list of them, got {value!r}"
        )
    return frozenset(ids)


def parse_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype of ``fp32`` or ``bf16``; raises `ModelFormatError` for another name."""
    if name == "fp16":
        raise ModelFormatError(
            "dtype fp16 is refused: its range overflows in router logits; use bf16 (same size) or fp32"
        )
    if name not in _DTYPES:
        raise ModelFormatError(f"dtype {name!r} is not known; use {' or '.join(_DTYPES)}")
    return _DTYPES[name]
