"""From logits to a token. Randomness is counter-based: a pure function of the seed and the position, so that a
sequence's tokens do not depend on its neighbours, on chunking or on a restart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import GenerationError


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn. The filters apply in the order of the fields, after the temperature."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Keep the k most probable tokens."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probability reaches this (nucleus sampling)."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the largest probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen before are divided by it where positive and multiplied where negative (CTRL)."""
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "in [0, 1)")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "more than 0")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0):
            raise GenerationError(
                "top_k, top_p and min_p have no effect at temperature 0, which takes the most probable token; "
                "raise the temperature or drop them"
            )


def sample_token(logits_V: Tensor, params: SamplingParams, position: int, seen_ids: Sequence[int]) -> int:
    """Draws the token at ``position`` from (vocabulary,) logits; ``seen_ids`` are the sequence's earlier tokens."""
    logits_V = logits_V.float()
    if params.repetition_penalty != 1.0:
        logits_V = _penalise(logits_V, seen_ids, params.repetition_penalty)
    if params.temperature == 0:
        return int(logits_V.argmax())
    probs, ids = (logits_V / params.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    probs = probs[: _count_kept(probs, params)].double()
    generator = torch.Generator().manual_seed((params.seed * 0x9E3779B97F4A7C15 + position) % 2**63)
    threshold = torch.rand((), generator=generator, dtype=torch.float64) * probs.sum().cpu()
    chosen = int(torch.searchsorted(probs.cumsum(0).cpu(), threshold, right=True))
    return int(ids[min(chosen, probs.shape[0] - 1)])


def _count_kept(sorted_probs: Tensor, params: SamplingParams) -> int:
    kept = sorted_probs.shape[0] if params.top_k is None else min(params.top_k, sorted_probs.shape[0])
    if params.top_p < 1:
        before = sorted_probs.cumsum(0) - sorted_probs
        kept = min(kept, int((before < params.top_p).sum()))
    if params.min_p > 0:
        kept = min(kept, int((sorted_probs >= params.min_p * sorted_probs[0]).sum()))
    return max(1, kept)


def _penalise(logits_V: Tensor, seen_ids: Sequence[int], penalty: float) -> Tensor:
    ids = torch.tensor(sorted(set(seen_ids)), dtype=torch.int64, device=logits_V.device)
    seen = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def _require(is_valid: bool, name: str, value: object, rule: str) -> None:
    if not is_valid:
        raise GenerationError(f"{name} ({value}) must be {rule}")
