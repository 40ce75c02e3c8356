"""From logits to a token. Randomness is counter-based: a pure function of the seed and the position, so that a
sequence's tokens do not depend on its neighbours, on chunking or on a restart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import GenerationError


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn: the repetition penalty, the temperature, then ``top_k``, ``top_p`` and ``min_p`` in this
    order, each on the probabilities that the one before has left, scaled to sum to one. Raises `GenerationError`."""

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
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more, and finite")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "in [0, 1)")
        _require(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "more than 0, and finite",
        )
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0):
            raise GenerationError(
                "top_k, top_p and min_p have no effect at temperature 0, which takes the most probable token; "
                "raise the temperature or drop them"
            )


def sample_token(logits_V: Tensor, params: SamplingParams, position: int, seen_ids: Sequence[int]) -> int:
    """Draws the token at ``position`` from (vocabulary,) logits; ``seen_ids`` are the sequence's earlier tokens.

    Raises `GenerationError` when the logits hold NaN or plus infinity, or nothing but minus infinity.
    """
    logits_V = logits_V.float()
    if params.repetition_penalty != 1.0:
        logits_V = _penalise(logits_V, seen_ids, params.repetition_penalty)
    largest = logits_V.max()
    if not largest.isfinite():
        raise GenerationError(
            f"the largest logit of the token at position {position} is {float(largest)}; the weights may hold NaN or "
            "infinity, or overflow in this dtype: try fp32"
        )
    if params.temperature == 0:
        return int(logits_V.argmax())
    # float64, and 0 at the top, so that no temperature however small overflows.
    scaled_V = ((logits_V - largest).double() / params.temperature).float()
    probs, ids = _keep(scaled_V.softmax(dim=-1), params)
    cumulative = probs.cumsum(0).cpu()
    threshold = draw_uniform(params.seed, position) * cumulative[-1]
    drawn = int(torch.searchsorted(cumulative, threshold, right=True))
    return drawn if ids is None else int(ids[drawn])


def draw_uniform(seed: int, position: int) -> float:
    """Returns a number in [0, 1) with 53 random bits, a pure function of all bits of its arguments."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def derive_seed(seed: int, name: str) -> int:
    """Returns the seed of one text of many, a pure function of all bits of the common seed and the text's name."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _keep(probs_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Returns float64 probabilities that the parameters leave, and which tokens they are of; None for all in order, of
    which some may be 0. Sorts as few as it can, which is what a draw from a large vocabulary costs."""
    if params.top_k is None and params.top_p == 1:
        kept_V = probs_V.double()
        return kept_V.masked_fill(probs_V < params.min_p * probs_V.max(), 0), None
    cut = params.top_k if params.top_k is not None and params.top_k < probs_V.shape[0] else None
    ids = _find_likely(probs_V, cut, params.top_p)
    sorted_probs, order = probs_V[ids].sort(descending=True, stable=True)
    probs = sorted_probs.double()[:cut]
    total = probs_V.double().sum() if cut is None else probs.sum()
    return _filter(probs, total, params), ids[order]


def _find_likely(probs_V: Tensor, cut: int | None, top_p: float) -> Tensor:
    """Returns the tokens, in order, among which are all that ``top_k`` and ``top_p`` can leave.

    cut: ``top_k``; None where it leaves no token out.
    """
    # Where nothing is cut, the tokens below come to less than half of what the nucleus may leave out.
    least = (1 - top_p) / probs_V.shape[0] / 2 if cut is None else probs_V.topk(cut).values[-1]
    return (probs_V >= least).nonzero().squeeze(1)


def _filter(probs: Tensor, total: Tensor, params: SamplingParams) -> Tensor:
    """Returns the first of the descending probabilities, as many as ``top_p`` and ``min_p`` keep; one at least.

    total: of all that ``top_k`` leaves, which may be more than those given.
    """
    if params.top_p < 1:
        before = probs.cumsum(0) - probs
        probs = probs[: max(1, int((before < params.top_p * total).sum()))]
    if params.min_p > 0:
        probs = probs[: int((probs >= params.min_p * probs[0]).sum())]
    return probs


def _penalise(logits_V: Tensor, seen_ids: Sequence[int], penalty: float) -> Tensor:
    ids = torch.tensor(sorted(set(seen_ids)), dtype=torch.int64, device=logits_V.device)
    seen = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def _require(is_valid: bool, name: str, value: object, rule: str) -> None:
    if not is_valid:
        raise GenerationError(f"{name} ({value}) must be {rule}")
