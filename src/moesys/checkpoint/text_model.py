"""A model folder, or a packed file, as what it takes to write text: the decoder and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint.companion_files import GENERATION_CONFIG_FILE, select_tokenizer_files
from moesys.checkpoint.hf import read_config_file
from moesys.checkpoint.json_object import parse_object
from moesys.checkpoint.load import load_model
from moesys.checkpoint.model_files import read_json_object
from moesys.checkpoint.packed_file import is_packed_path, open_packed_file
from moesys.data import ChatTemplates, Tokenizer
from moesys.data.tokenizer_files import TOKENIZER_FILE
from moesys.errors import DataError, ModelFormatError
from moesys.kernels import Int8Product
from moesys.models import Decoder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TextTools:
    """What turns text into a model's tokens and back.

    path:      the folder or packed file.
    stop_ids:  tokens that end a text: the tokenizer's end of text, and those that the model's configs name.
    """

    path: Path
    tokenizer: Tokenizer
    stop_ids: frozenset[int]

    def require_fit(self, vocab_size: int) -> None:
        """Raises `ModelFormatError` when a model embeds fewer tokens than there are."""
        if self.tokenizer.vocab_size > vocab_size:
            raise ModelFormatError(
                f"the tokenizer in {self.path} has {self.tokenizer.vocab_size} tokens, the model embeds "
                f"{vocab_size}; they do not belong together"
            )


@dataclass(frozen=True)
class TextModel:
    """A decoder that fits its tokenizer."""

    decoder: Decoder
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """See `TextTools`."""


def read_text_tools(path: Path) -> TextTools:
    """Reads the tokenizer of a Hugging Face folder or of a packed file. Raises `ModelFormatError` or `DataError`."""
    if not is_packed_path(path):
        config = read_config_file(path)
        generation = path / GENERATION_CONFIG_FILE
        keys = read_json_object(generation) if generation.exists() else {}
        return _make_tools(path, Tokenizer.load(path), config, keys)
    with open_packed_file(path) as packed:
        config, files = packed.header.config, packed.read_files()
    if TOKENIZER_FILE not in files:
        raise DataError(
            f"{path} holds no {TOKENIZER_FILE}: the folder that it was packed from had none; add one there and pack "
            "it again"
        )
    keys = _parse_object(files[GENERATION_CONFIG_FILE], path) if GENERATION_CONFIG_FILE in files else {}
    return _make_tools(
        path, Tokenizer.parse(select_tokenizer_files(files), path / TOKENIZER_FILE), config, keys
    )


def read_chat_templates(path: Path) -> ChatTemplates:
    """Reads the chat templates of a Hugging Face folder or of a packed file. Raises `ModelFormatError` or
    `DataError`."""
    if not is_packed_path(path):
        return ChatTemplates.load(path)
    with open_packed_file(path) as packed:
        return ChatTemplates.parse(packed.read_files(), str(path))


def load_text_model(
    path: Path,
    dtype: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    product: Int8Product | None = None,
) -> TextModel:
    """Loads a Hugging Face folder or a packed file.

    dtype: ``fp32``, ``bf16`` or None for the stored one. product: how int8 weights are multiplied; None for ``w8``.
    ``on_progress`` gets (bytes read, bytes to read).

    Raises `ModelFormatError` or `DataError`, and what `moesys.checkpoint.load.load_model` raises.
    """
    weights_dtype = None if dtype is None else parse_dtype(dtype)
    tools = read_text_tools(path)
    decoder = load_model(path, weights_dtype, on_progress, product=product)
    tools.require_fit(decoder.config.vocab_size)
    return TextModel(decoder, tools.tokenizer, tools.stop_ids)


def _make_tools(
    path: Path, tokenizer: Tokenizer, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> TextTools:
    stop_ids = _find_stop_ids(path, config, generation)
    return TextTools(path, tokenizer, stop_ids | {tokenizer.end_of_text_id})


def _parse_object(contents: bytes, path: Path) -> dict[str, Any]:
    try:
        return parse_object(contents)
    except ValueError as error:
        raise ModelFormatError(
            f"{GENERATION_CONFIG_FILE} in {path} must hold a JSON object: {error}"
        ) from None


def _find_stop_ids(path: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> frozenset[int]:
    """Returns ``eos_token_id``, a number or a list, of ``generation_config.json``, else of ``config.json``."""
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ModelFormatError(f"eos_token_id in {path} must be a token id or a list of them, got {value!r}")
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
