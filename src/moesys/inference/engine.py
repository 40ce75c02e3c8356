"""The engine: sequences with KV caches, and steps over any mixture of new tokens.

A step is a list of plain records, one per sequence: where its new tokens begin and what they are. One token is
decoding, many are prefill or a chunk of it, and a start before the cached length takes tokens back, so chunked
prefill, batching and speculation are the same call. Which records make up a step is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import GenerationError
from moesys.inference.kv_cache import CachedAttend, SequenceCache, Span
from moesys.kernels import use_kernel
from moesys.models import Decoder
from moesys.moe import Execution


@dataclass(frozen=True)
class SequenceStep:
    """New tokens of one sequence.

    start:      position of the first of them; at most the number of tokens already cached.
    token_ids:  one or more tokens.
    num_logits: of how many of the last tokens logits are wanted; None for all of them.
    """

    sequence_id: int
    start: int
    token_ids: Sequence[int]
    num_logits: int | None = None


class Engine:
    """Runs a decoder over sequences that it keeps the keys and values of.

    The kernel that its `Execution` names computes every matrix of the model, the dense ones too.
    """

    def __init__(self, model: Decoder, execution: Execution | None = None) -> None:
        self.model = model
        self._execution = model.make_resident_execution() if execution is None else execution
        self._caches: dict[int, SequenceCache] = {}
        self._next_id = 0

    def open_sequence(self, capacity: int) -> int:
        """Allocates the cache of a new sequence of at most ``capacity`` tokens and returns its id.

        Raises `GenerationError` when the model was not made for so many positions.
        """
        limit = self.model.config.position_limit
        if not 1 <= capacity <= limit:
            raise GenerationError(
                f"the sequence needs {capacity} positions, the model was made for 1 to {limit}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        weight = self.model.embedding.weight
        config = self.model.config
        sequence_id, self._next_id = self._next_id, self._next_id + 1
        self._caches[sequence_id] = SequenceCache(config.mixers, capacity, weight.dtype, weight.device)
        return sequence_id

    def close_sequence(self, sequence_id: int) -> None:
        """Frees a sequence's cache. Raises `GenerationError` when the sequence is not open."""
        del self._caches[self._check_open(sequence_id)]

    @torch.no_grad()
    def step(self, steps: Sequence[SequenceStep]) -> list[Tensor]:
        """Runs the new tokens of every sequence in one pass.

        Returns for each record the (wanted tokens, vocabulary) logits. Raises `GenerationError` for a record that
        does not fit its sequence; no cache has changed then. After any other failure, such as lack of memory, each
        sequence holds the tokens before its ``start``.
        """
        spans = self._plan_spans(steps)
        wanted = [len(step.token_ids) if step.num_logits is None else step.num_logits for step in steps]
        for span in spans:
            span.cache.length = span.past
        device = self.model.embedding.weight.device
        token_ids = torch.tensor([t for step in steps for t in step.token_ids], device=device)
        positions = torch.cat([torch.arange(span.past, span.stop, device=device) for span in spans])
        with use_kernel(self._execution.kernel):
            output = self.model(token_ids[None], positions[None], CachedAttend(spans), self._execution)
            for span in spans:
                span.cache.length = span.stop
            hidden = [
                output.hidden_BSD[0, span.end - n : span.end] for span, n in zip(spans, wanted, strict=True)
            ]
            return list(self.model.compute_logits(torch.cat(hidden)).split(wanted))

    def _check_open(self, sequence_id: int) -> int:
        if sequence_id not in self._caches:
            raise GenerationError(f"sequence {sequence_id} is not open; open ones: {sorted(self._caches)}")
        return sequence_id

    def _plan_spans(self, steps: Sequence[SequenceStep]) -> list[Span]:
        if not steps:
            raise GenerationError("a step needs the new tokens of at least one sequence")
        if len({step.sequence_id for step in steps}) != len(steps):
            raise GenerationError("a sequence may occur once in a step; put its new tokens in one record")
        spans: list[Span] = []
        start = 0
        for step in steps:
            cache = self._caches[self._check_open(step.sequence_id)]
            _check_step(step, cache, self.model.config.vocab_size)
            spans.append(Span(cache, start, start + len(step.token_ids), step.start))
            start += len(step.token_ids)
        return spans


def _check_step(step: SequenceStep, cache: SequenceCache, vocab_size: int) -> None:
    if not step.token_ids:
        raise GenerationError(f"sequence {step.sequence_id}: a step needs at least one new token")
    if not 0 <= step.start <= cache.length:
        raise GenerationError(
            f"sequence {step.sequence_id}: new tokens start at {step.start}, but {cache.length} tokens are cached; "
            "positions must follow without a gap"
        )
    if step.start + len(step.token_ids) > cache.capacity:
        raise GenerationError(
            f"sequence {step.sequence_id}: {step.start + len(step.token_ids)} tokens do not fit its capacity "
            f"({cache.capacity}); open it with a larger one"
        )
    if step.num_logits is not None and not 1 <= step.num_logits <= len(step.token_ids):
        raise GenerationError(
            f"sequence {step.sequence_id}: num_logits ({step.num_logits}) must be 1 to the number of new tokens "
            f"({len(step.token_ids)})"
        )
    if not all(0 <= token_id < vocab_size for token_id in step.token_ids):
        raise GenerationError(
            f"sequence {step.sequence_id}: token ids must be 0 to {vocab_size - 1}, got "
            f"{min(step.token_ids)} to {max(step.token_ids)}"
        )
