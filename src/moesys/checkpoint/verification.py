"""Whether a folder that was written is the model that it was written from: every tensor's bits, and the logits.

Tensors are compared as a stream, so that one model is in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesys.checkpoint.hf import load_model
from moesys.checkpoint.model_files import FileTensor, describe_problems, open_model_files
from moesys.checkpoint.stored_chunks import iterate_chunks
from moesys.errors import CheckpointError
from moesys.models import Decoder, DocumentAttend, Family, StoredTensor

_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Verification:
    """What was compared and found equal, and how far the logits are apart.

    num_tensors:       whose bits are those of the source in the written dtype.
    logit_difference:  the largest, of the logits of a prompt of 16 tokens before and after; ``largest_logit`` is what
                       to hold it against.
    """

    num_tensors: int
    logit_difference: float
    largest_logit: float

    def describe(self) -> str:
        """Two lines for people."""
        return (
            f"verified: {self.num_tensors} tensors are equal bit for bit\n"
            f"verified: the logits of a prompt, up to {self.largest_logit:.3g}, differ by at most "
            f"{self.logit_difference:.3g}"
        )


def verify_export(model: Decoder, family: Family, folder: Path, dtype: torch.dtype) -> Verification:
    """Compares a folder with the model that it was written from, and the logits of both; changes the model to
    evaluation.

    family, dtype: as which it was written. Memory: a second model. Raises `CheckpointError` that lists the tensors that
    differ.
    """
    num_tensors = compare_weights(model, family, folder, dtype)
    return compare_logits(compute_prompt_logits(model.eval()), folder, num_tensors)


def compare_weights(model: Decoder, family: Family, folder: Path, dtype: torch.dtype) -> int:
    """Compares the files of a folder with the model that they were written from, and returns the number of tensors.

    family, dtype: as which it was written. Raises `CheckpointError` that lists the tensors that differ.
    """
    stored = {tensor.name: tensor for tensor in family.list_tensors(model)}
    with open_model_files(folder) as tensors:
        problems = [f"{name} is missing" for name in sorted(stored.keys() - tensors.keys())]
        problems += [f"{name} was not to be written" for name in sorted(tensors.keys() - stored.keys())]
        problems += [
            f"{name} differs"
            for name in sorted(stored.keys() & tensors.keys())
            if not _is_equal(stored[name], tensors, dtype)
        ]
    if problems:
        raise CheckpointError(
            describe_problems(
                f"what was written to {folder.name} is not the source, and was removed", problems
            )
        )
    return len(stored)


def compute_prompt_logits(model: Decoder) -> Tensor:
    """Returns (tokens, vocabulary) float32 logits of a short prompt of tokens from all over the vocabulary."""
    length = min(_PROMPT_TOKENS, model.config.position_limit)
    token_ids = torch.arange(length) * (model.config.vocab_size // length) % model.config.vocab_size
    with torch.no_grad():
        output = model(token_ids[None], torch.arange(length)[None], DocumentAttend(None))
        return model.compute_logits(output.hidden_BSD)[0].float()


def compare_logits(expected: Tensor, folder: Path, num_tensors: int) -> Verification:
    """Loads a folder and compares its `compute_prompt_logits` with those expected."""
    found = compute_prompt_logits(load_model(folder))
    return Verification(num_tensors, (found - expected).abs().max().item(), expected.abs().max().item())


def _is_equal(stored: StoredTensor, tensors: Mapping[str, FileTensor], dtype: torch.dtype) -> bool:
    tensor, dtype = tensors[stored.name], stored.dtype or dtype
    if (tensor.record.torch_dtype, tensor.record.shape) != (dtype, stored.shape):
        return False
    offset = tensor.span.offset
    for chunk in iterate_chunks(stored, dtype):
        if os.pread(tensor.span.descriptor, len(chunk), offset) != chunk:
            return False
        offset += len(chunk)
    return True
