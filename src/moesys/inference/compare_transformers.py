"""Our logits beside those of transformers on the same folder, where it is installed: an oracle, never a runtime."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesys.checkpoint import load_model
from moesys.errors import IneffectiveOptionError
from moesys.inference.verify import CheckedTokens, compute_logits
from moesys.planning import read_free_ram_bytes

FP32_TOLERANCE = 1e-5
"""Of max |difference| / max |logit|, both computed in float32."""

BF16_FACTOR = 1.5
"""By how much our error against float32 may exceed transformers' own, both computed in bfloat16."""


@dataclass(frozen=True)
class TransformersComparison:
    """How far our logits are from transformers'.

    skipped:     why nothing was compared; None where it was.
    error:       of ours: max |difference| / max |logit| in float32, else root mean square against float32 logits.
    limit:       what it may be.
    same_choice: share of positions at which both find the same token the likeliest.
    """

    skipped: str | None
    error: float = 0.0
    limit: float = 0.0
    same_choice: float = 0.0

    @property
    def is_close(self) -> bool | None:
        """None where nothing was compared."""
        return None if self.skipped is not None else self.error <= self.limit

    def describe(self) -> str:
        """One line for people."""
        if self.skipped is not None:
            return f"transformers: skipped ({self.skipped})"
        return (
            f"transformers: error {self.error:.2e}, limit {self.limit:.2e}: {'ok' if self.is_close else 'TOO FAR'}; "
            f"the same likeliest token at {self.same_choice:.0%} of the positions"
        )


def compare_with_transformers(model: Path, *, is_wanted: bool | None = None) -> TransformersComparison:
    """Computes the logits of fixed random tokens here, as `verify_model` does, and in transformers in one pass.

    is_wanted: None compares where it can. Raises `IneffectiveOptionError` where it is wanted and cannot be done.
    """
    obstacle = "not asked for" if is_wanted is False else _find_obstacle(model)
    if obstacle is not None:
        if is_wanted:
            raise IneffectiveOptionError(f"--transformers has no effect: {obstacle}; drop it")
        return TransformersComparison(obstacle)
    ours_model = load_model(model)
    dtype = ours_model.embedding.weight.dtype
    tokens = CheckedTokens.draw(ours_model.config)
    token_ids = list(tokens.token_ids)
    ours = torch.cat(compute_logits(ours_model, None, tokens)).float()
    del ours_model
    oracle = _compute_theirs(model, torch.float32, token_ids)
    same_choice = float((ours.argmax(-1) == oracle.argmax(-1)).float().mean())
    if dtype == torch.float32:
        error = float((ours - oracle).abs().max() / oracle.abs().max())
        return TransformersComparison(None, error, FP32_TOLERANCE, same_choice)
    theirs = _compute_theirs(model, dtype, token_ids)
    return TransformersComparison(
        None, _compute_rms(ours - oracle), BF16_FACTOR * _compute_rms(theirs - oracle), same_choice
    )


def _find_obstacle(model: Path) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install 'moesys[bench]'"
    if not model.is_dir():
        return "it reads folders in Hugging Face layout, not packed files"
    num_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    needed, free = 3 * num_bytes, read_free_ram_bytes()
    if needed > free:
        return f"its float32 model needs up to {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
    return None


def _compute_theirs(model: Path, dtype: torch.dtype, token_ids: list[int]) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).eval()
    with torch.no_grad():
        return theirs(torch.tensor([token_ids])).logits[0].float()


def _compute_rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())
