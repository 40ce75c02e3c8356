"""A model folder as what it takes to write text: the decoder and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moesys.checkpoint.hf import load_model, read_config_file
from moesys.data import Tokenizer
from moesys.errors import ModelFormatError
from moesys.models import Decoder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TextModel:
    """A decoder that fits its tokenizer."""

    decoder: Decoder
    tokenizer: Tokenizer


def load_text_model(folder: Path, dtype: str | None = None) -> TextModel:
    """Loads a Hugging Face folder. dtype: ``fp32``, ``bf16`` or None for the stored one.

    Raises `ModelFormatError` or `DataError`.
    """
    weights_dtype = None if dtype is None else parse_dtype(dtype)
    read_config_file(folder)
    tokenizer = Tokenizer.load(folder)
    decoder = load_model(folder, weights_dtype)
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise ModelFormatError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model embeds "
            f"{decoder.config.vocab_size}; they do not belong together"
        )
    return TextModel(decoder, tokenizer)


def parse_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype of ``fp32`` or ``bf16``; raises `ModelFormatError` for another name."""
    if name == "fp16":
        raise ModelFormatError(
            "dtype fp16 is refused: its range overflows in router logits; use bf16 (same size) or fp32"
        )
    if name not in _DTYPES:
        raise ModelFormatError(f"dtype {name!r} is not known; use {' or '.join(_DTYPES)}")
    return _DTYPES[name]
