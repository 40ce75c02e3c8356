"""The engine: sequences with KV caches, and steps over any mixture of new tokens.

A step is a list of plain records, one per sequence: where its new tokens begin and what they are. One token is
decoding, many are prefill or a chunk of it, and a start before the cached length takes tokens back, so chunked
prefill, batching and speculation are the same call. Which records make up a step is decided elsewhere.

Keys and values lie in pages of one pool. A pool of a given size is allocated once, and sequences compete for it; one
without a size grows, whenever a sequence is opened, to what all open ones can come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import GenerationError
from moesys.inference.decode_attention import PieceReader
from moesys.inference.kv_cache import CachedAttend, SequenceCache, Span
from moesys.inference.pages import PAGE_TOKENS, PagePool
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

    def __init__(
        self,
        model: Decoder,
        execution: Execution | None = None,
        *,
        num_pages: int | None = None,
        page_tokens: int = PAGE_TOKENS,
    ) -> None:
        """num_pages: for the tokens of all sequences together, ``page_tokens`` each; None for as many as they need."""
        self.model = model
        self._execution = model.make_resident_execution() if execution is None else execution
        weight = model.embedding.weight
        mixers = model.config.mixers
        self._pool = PagePool(mixers, num_pages or 0, page_tokens, dtype=weight.dtype, device=weight.device)
        self._is_growing = num_pages is None
        self._reader = PieceReader(self._pool.widths, weight.device)
        self._is_recurrent = any(mixer.state_shapes for mixer in mixers)
        self._caches: dict[int, SequenceCache] = {}
        self._next_id = 0

    @property
    def kv_bytes(self) -> int:
        """Allocated for keys and values."""
        return self._pool.num_bytes

    def has_room(self, capacity: int) -> bool:
        """Whether a new sequence of ``capacity`` tokens and all open ones can come to their full lengths together."""
        return self._is_growing or self._count_missing_pages([capacity]) <= 0

    def make_room(self, capacities: Sequence[int]) -> None:
        """Lets a pool that grows do so once, for new sequences of such capacities together. Changes no other pool."""
        if self._is_growing:
            self._pool.extend(max(0, self._count_missing_pages(capacities)))

    def require_fit(self, capacity: int) -> None:
        """Raises `GenerationError` when the model was not made for a sequence of ``capacity`` tokens, or they are more
        than all pages hold."""
        require_positions(capacity, self.model.config.position_limit)
        pool = self._pool
        if not self._is_growing and pool.count_pages(capacity) > pool.num_pages:
            raise GenerationError(
                f"the sequence needs {capacity} positions, the pages for keys and values hold "
                f"{pool.num_pages * pool.page_tokens}; shorten the prompt, ask for fewer new tokens, or make more pages"
            )

    def open_sequence(self, capacity: int) -> int:
        """Opens a new sequence of at most ``capacity`` tokens and returns its id. It takes pages when it has tokens.

        Raises `GenerationError` as `require_fit` does.
        """
        self.require_fit(capacity)
        self.make_room([capacity])
        sequence_id, self._next_id = self._next_id, self._next_id + 1
        self._caches[sequence_id] = SequenceCache(self._pool, capacity)
        return sequence_id

    def close_sequence(self, sequence_id: int) -> None:
        """Gives a sequence's pages back. Raises `GenerationError` when the sequence is not open."""
        self._caches.pop(self._check_open(sequence_id)).close()

    @torch.no_grad()
    def step(self, steps: Sequence[SequenceStep]) -> list[Tensor]:
        """Runs the new tokens of every sequence in one pass.

        Returns for each record the (wanted tokens, vocabulary) logits. Raises `GenerationError` for a record that
        does not fit its sequence, and for new tokens that need more pages than are free; no cache has changed then.
        After any other failure, such as lack of memory, each sequence holds the tokens before its ``start``.
        """
        spans = self._plan_spans(steps)
        wanted = [len(step.token_ids) if step.num_logits is None else step.num_logits for step in steps]
        self._require_pages(spans)
        for span in sorted(spans, key=lambda span: span.num_missing_pages):
            span.cache.resize(span.stop)
            span.cache.length = span.past
        device = self._pool.device
        token_ids = torch.tensor([t for step in steps for t in step.token_ids], device=device)
        positions = torch.tensor([p for span in spans for p in range(span.past, span.stop)], device=device)
        attend = CachedAttend(self._pool, spans, self._reader)
        with use_kernel(self._execution.kernel):
            output = self.model(token_ids[None], positions[None], attend, self._execution)
            attend.commit()
            hidden = [
                output.hidden_BSD[0, span.end - n : span.end] for span, n in zip(spans, wanted, strict=True)
            ]
            return list(self.model.compute_logits(torch.cat(hidden)).split(wanted))

    def _count_missing_pages(self, capacities: Sequence[int]) -> int:
        """Returns the pages that are too few for new sequences beside all open ones, each at its full length."""
        reserved = sum(cache.num_reserved_pages for cache in self._caches.values())
        return reserved + sum(map(self._pool.count_pages, capacities)) - self._pool.num_pages

    def _require_pages(self, spans: Sequence[Span]) -> None:
        missing = sum(span.num_missing_pages for span in spans)
        num_free = self._pool.allocator.num_free
        if missing > num_free:
            held = ", ".join(f"sequence {i} {len(cache.pages)}" for i, cache in self._caches.items())
            raise GenerationError(
                f"the new tokens need {missing} more pages of {self._pool.page_tokens} tokens and {num_free} of "
                f"{self._pool.num_pages} are free; held: {held}; close a sequence, or make an engine of more pages"
            )

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
            if self._is_recurrent and step.start not in (0, cache.length):
                raise GenerationError(
                    f"sequence {step.sequence_id}: new tokens start at {step.start} of {cache.length}, but a recurrent "
                    f"mixer keeps the state after the last token alone; start at 0 or {cache.length}"
                )
            spans.append(Span(cache, start, start + len(step.token_ids), step.start))
            start += len(step.token_ids)
        return spans


def require_positions(num_tokens: int, position_limit: int) -> None:
    """Raises `GenerationError` when a sequence of ``num_tokens`` is not what a model was made for."""
    if not 1 <= num_tokens <= position_limit:
        raise GenerationError(
            f"the sequence needs {num_tokens} positions, the model was made for 1 to {position_limit}; "
            "shorten the prompt or ask for fewer new tokens"
        )


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
