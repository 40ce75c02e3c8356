"""Whether a folder that was written is the model that it was written from: every tensor's bits, and the logits.

Equal tensors are not yet an equal model: ``config.json`` says how they are computed. The logits of a prompt tell, and
since both sides compute the same numbers by the same kernels, they must be equal bit for bit. Only what another dtype
does to the source is held against a bound. Tensors are compared as a stream, so that one model is in memory at a time.
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
from moesys.moe import Router

_PROMPT_TOKENS = 16

_LARGEST_DTYPE_EFFECT = 0.5
"""Bound on ‖logits in the written dtype − logits in the source's‖ / ‖logits in the source's‖, all of the prompt's.

Rounding to bfloat16 moves small random models of every family by 0.01, and by up to 0.17 where it flips a token's
choice of experts; logits that have nothing to do with each other are √2 apart, and those of a model that answers
nothing 1. Half lies between. A tighter one would refuse right conversions for a single flip, and need not be: the bits
of the written model are compared with the rounded source's.
"""


@dataclass(frozen=True)
class Verification:
    """What was compared: bits are equal, and the logits are as far apart as the change of dtype makes them.

    num_tensors:       whose bits are those of the source in the written dtype.
    logit_difference:  the largest, of the logits of a prompt of 16 tokens in the source's dtype and in the written one;
                       0 where they are the same. ``largest_logit`` is what to hold it against.
    """

    num_tensors: int
    logit_difference: float
    largest_logit: float

    def describe(self) -> str:
        """Two lines for people, three where the dtype changed the logits."""
        lines = [
            f"verified: {self.num_tensors} tensors are equal bit for bit",
            "verified: the logits of a prompt are equal bit for bit to those of the source in the written dtype",
        ]
        if self.logit_difference:
            lines.append(
                f"verified: the change of dtype moves these logits, up to {self.largest_logit:.3g}, by at most "
                f"{self.logit_difference:.3g}"
            )
        return "\n".join(lines)


def verify_export(model: Decoder, family: Family, folder: Path, dtype: torch.dtype) -> Verification:
    """Compares a folder with the model that it was written from, and the logits of both; changes the model to the
    numbers that were written, and to evaluation.

    family, dtype: as which it was written. Memory: a second model. Raises `CheckpointError` that lists the tensors that
    differ, or says how far the logits are apart.
    """
    num_tensors = compare_weights(model, family, folder, dtype)
    return compare_logits(compute_written_logits(model, family, dtype), folder, num_tensors)


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


def compute_written_logits(model: Decoder, family: Family, dtype: torch.dtype) -> Tensor:
    """Changes a model to what `load_model` makes of the numbers that were written, and to evaluation; returns its
    `compute_prompt_logits`.

    Routers are computed in float32 from numbers that may have been rounded when they were written.
    """
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float32 if isinstance(module, Router) else dtype)
        for stored in family.list_tensors(model):
            written_dtype = stored.dtype or dtype
            if stored.view.dtype != written_dtype:
                stored.view.copy_(stored.view.to(written_dtype))
    return compute_prompt_logits(model.eval())


def compute_prompt_logits(model: Decoder) -> Tensor:
    """Returns (tokens, vocabulary) float32 logits of a short prompt of tokens from all over the vocabulary."""
    length = min(_PROMPT_TOKENS, model.config.position_limit)
    token_ids = torch.arange(length) * (model.config.vocab_size // length) % model.config.vocab_size
    with torch.no_grad():
        output = model(token_ids[None], torch.arange(length)[None], DocumentAttend(None))
        return model.compute_logits(output.hidden_BSD)[0].float()


def compare_logits(
    expected: Tensor, folder: Path, num_tensors: int, original: Tensor | None = None
) -> Verification:
    """Loads a folder and compares its `compute_prompt_logits`.

    expected: those of the source in the written dtype; the folder's must have the same bits. original: those in the
    source's own dtype where it is another one; they may be half their norm away.

    Raises `CheckpointError` for logits that differ by more, or that are NaN or infinite.
    """
    original = expected if original is None else original
    _require_finite(original, "the source's")
    _require_finite(expected, "the source's, in the written dtype,")
    found = compute_prompt_logits(load_model(folder))
    if found.shape != expected.shape or not torch.equal(found.view(torch.int32), expected.view(torch.int32)):
        raise CheckpointError(
            f"what was written to {folder.name} is not the source, and was removed: its tensors are equal, but "
            f"{_describe_difference(found, expected)}; its config.json describes another model"
        )
    effect = ((expected - original).norm() / original.norm()).item()
    if effect > _LARGEST_DTYPE_EFFECT:
        raise CheckpointError(
            f"the written dtype makes another model of the source: the logits of a prompt move by {effect:.2g} of "
            f"their norm, more than {_LARGEST_DTYPE_EFFECT}; nothing was kept, write fp32 instead"
        )
    return Verification(num_tensors, (expected - original).abs().max().item(), original.abs().max().item())


def _require_finite(logits: Tensor, whose: str) -> None:
    num_odd = logits.numel() - int(logits.isfinite().sum())
    if num_odd:
        raise CheckpointError(
            f"nothing can be verified: of the logits of a prompt, {whose} {num_odd} of {logits.numel()} are NaN or "
            "infinite; look for such weights with moesys inspect MODEL --check"
        )


def _describe_difference(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"the logits of a prompt have shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    num_unequal = int((found.view(torch.int32) != expected.view(torch.int32)).sum())
    largest = (found - expected).abs().max().item()
    return f"{num_unequal} of {expected.numel()} logits of a prompt differ, by up to {largest:.3g}"


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
