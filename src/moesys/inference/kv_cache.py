"""Keys and values of the sequences in flight, and the attention that reads them.

What a mixer caches is its own business: keys and values, or one latent that serves as both. Where it lies is the
`PagePool`'s. The idea: all new tokens of a step are written at once; then each sequence attends by itself, in a form
that depends on nothing but its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moesys.inference.decode_attention import PIECE_TOKENS, Piece, PieceReader, attend_one
from moesys.inference.pages import PagePool
from moesys.kernels.attention import PageTable, attend_pages, reads_in_place
from moesys.models import SoftmaxRule, compute_attention
from moesys.models.attend import Recurrence, State


class SequenceCache:
    """The pages of one sequence of at most ``capacity`` tokens; it takes them as it grows."""

    def __init__(self, pool: PagePool, capacity: int) -> None:
        self._pool = pool
        self._home = pool.allocator.reserve(pool.count_pages(capacity))
        self.capacity = capacity
        self.pages: list[int] = []
        """In the order of the tokens that they hold."""
        self.states: dict[int, State] = {}
        """What recurrent mixers keep of the tokens so far, by layer."""
        self.length = 0
        """Tokens whose keys and values are final; set by the engine after a step."""

    @property
    def num_reserved_pages(self) -> int:
        """Pages that a sequence of its capacity takes."""
        return self._pool.count_pages(self.capacity)

    def count_missing_pages(self, num_tokens: int) -> int:
        """Returns how many more pages ``num_tokens`` take than there are."""
        return self._pool.count_pages(num_tokens) - len(self.pages)

    def resize(self, num_tokens: int) -> None:
        """Takes or gives back pages, so that the sequence has as many as ``num_tokens`` take. Enough must be free."""
        num_pages = self._pool.count_pages(num_tokens)
        self._pool.allocator.give_back(self.pages[num_pages:])
        del self.pages[num_pages:]
        while len(self.pages) < num_pages:
            self.pages.append(self._pool.allocator.take(self._home))

    def close(self) -> None:
        """Gives back all pages."""
        self.resize(0)
        self._pool.allocator.dissolve(self._home)

    def find_runs(self, start: int, stop: int) -> list[slice]:
        """Returns the rows of memory that hold the tokens from ``start`` to ``stop``, in as few slices as possible."""
        size = self._pool.page_tokens
        runs: list[slice] = []
        for first in (start, *range((start // size + 1) * size, stop, size)):
            end = min(stop, (first // size + 1) * size)
            row = self.pages[first // size] * size + first % size
            begin = runs.pop().start if runs and runs[-1].stop == row else row
            runs.append(slice(begin, row + end - first))
        return runs

    def find_pieces(self, first: int, stop: int) -> list[Piece]:
        """Returns the tokens from ``first`` to ``stop`` in pieces; see `decode_attention`."""
        start = first - first % self._pool.page_tokens
        return [
            Piece(self.find_runs(begin, min(begin + PIECE_TOKENS, stop)), max(0, first - begin))
            for begin in range(start, stop, PIECE_TOKENS)
        ]


BLOCK_TOKENS = 512
"""Positions at whose multiples attention is cut, so that the bits of a prompt are the same in passes of any multiple of
them: sums over keys depend on how many queries are computed together."""


@dataclass(frozen=True)
class Span:
    """The new tokens of one sequence in a flat step: rows [start, end), after ``past`` cached tokens."""

    cache: SequenceCache
    start: int
    end: int
    past: int

    @property
    def num_new(self) -> int:
        return self.end - self.start

    @property
    def stop(self) -> int:
        """The position after the last new token."""
        return self.past + self.num_new

    @property
    def num_missing_pages(self) -> int:
        """Pages that the sequence lacks for its new tokens; negative where tokens were taken back."""
        return self.cache.count_missing_pages(self.stop)

    def cut(self, num_tokens: int) -> Iterator[Span]:
        """Yields the new tokens in pieces that end at multiples of ``num_tokens`` positions."""
        past = self.past
        while past < self.stop:
            stop = min(self.stop, (past // num_tokens + 1) * num_tokens)
            start = self.start + past - self.past
            yield Span(self.cache, start, start + stop - past, past)
            past = stop

    def find_first_visible(self, sliding_window: int | None) -> int:
        """Returns the first position that any of the new tokens sees."""
        return 0 if sliding_window is None else max(0, self.past + 1 - sliding_window)


class CachedAttend:
    """Attention of flat new tokens, each over the cache of its own sequence. Writes their keys and values there."""

    caches_latents = True
    """A mixer with a latent hands over that alone; see `moesys.models.Attend`."""

    def __init__(self, pool: PagePool, spans: Sequence[Span], reader: PieceReader) -> None:
        self._pool = pool
        self._spans = spans
        self._reader = reader
        runs = [run for span in spans for run in span.cache.find_runs(span.past, span.stop)]
        rows = [row for run in runs for row in range(run.start, run.stop)]
        self._rows = torch.tensor(rows, device=pool.device)
        self._blocks = [block for span in spans for block in span.cut(BLOCK_TOKENS)]
        self._lone_rows = [block.start for block in self._blocks if block.num_new == 1]
        self._states: list[dict[int, State]] = [{} for _ in spans]
        self._pieces: dict[int | None, list[list[Piece]]] = {}
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor | None, rule: SoftmaxRule) -> Tensor:
        """See `moesys.models.Attend`; batch is 1 and the sequence holds the tokens of all spans."""
        cached = self._pool.layers[layer_id]
        for tensor, new in zip(cached, (k,) if v is None else (k, v), strict=True):
            tensor.index_copy_(0, self._rows, new[0])
        keys = cached[0]
        if len(self._lone_rows) == q.shape[1] and self._reads_in_place(q, cached, rule):
            return self._attend_in_place(q[0], cached, rule)[None]
        values = keys[..., : rule.value_size] if v is None else cached[1]
        y_THD = q.new_empty(*q.shape[1:3], values.shape[2])
        for block in self._blocks:
            if block.num_new > 1:
                own = None if v is None else values
                y_THD[block.start : block.end] = self._attend_tokens(block, q, keys, own, rule)
        if self._lone_rows and self._reads_in_place(q, cached, rule):
            y_THD[self._lone_rows] = self._attend_in_place(q[0, self._lone_rows], cached, rule)
        elif self._lone_rows:
            self._attend_lone_tokens(y_THD, q, keys, values, rule)
        return y_THD[None]

    def scan(self, layer_id: int, x: Tensor, recurrence: Recurrence) -> Tensor:
        """See `moesys.models.Attend`. The states that it leaves behind count when the step is `commit`ted."""
        outputs: list[Tensor] = []
        for span, states in zip(self._spans, self._states, strict=True):
            before = span.cache.states[layer_id] if span.past else None
            y, states[layer_id] = recurrence(x[0, span.start : span.end], before)
            outputs.append(y)
        return torch.cat(outputs)[None]

    def commit(self) -> None:
        """Makes the new tokens part of their sequences."""
        for span, states in zip(self._spans, self._states, strict=True):
            span.cache.states.update(states)
            span.cache.length = span.stop

    @cached_property
    def _table(self) -> PageTable:
        """Where lone tokens find what they see."""
        lone = [block for block in self._blocks if block.num_new == 1]
        pages, stops = [block.cache.pages for block in lone], [block.stop for block in lone]
        return PageTable.from_lists(self._pool.page_tokens, pages, stops, self._pool.device)

    def _reads_in_place(self, q: Tensor, cached: Sequence[Tensor], rule: SoftmaxRule) -> bool:
        keys, *values = cached
        return reads_in_place(q, keys, values[0] if values else None, self._table, rule.sinks_H)

    def _attend_in_place(self, q_THD: Tensor, cached: Sequence[Tensor], rule: SoftmaxRule) -> Tensor:
        """Attends with lone tokens by a kernel that copies nothing."""
        keys, *values = cached
        return attend_pages(
            q_THD,
            keys,
            values[0] if values else None,
            self._table,
            scale=rule.scale,
            value_size=rule.value_size,
            sliding_window=rule.sliding_window,
            sinks_H=rule.sinks_H,
        )

    def _attend_lone_tokens(
        self, y_THD: Tensor, q: Tensor, keys: Tensor, values: Tensor, rule: SoftmaxRule
    ) -> None:
        """Writes the rows of sequences with one new token each."""
        scaled = q[0, self._lone_rows].float() * rule.scale
        pieces = self._find_pieces(rule.sliding_window)
        for row, q_HD, seen in zip(self._lone_rows, scaled, pieces, strict=True):
            y_THD[row] = attend_one(q_HD, keys, values, seen, rule.sinks_H, self._reader)

    def _find_pieces(self, sliding_window: int | None) -> list[list[Piece]]:
        """Returns what each lone token sees, found once per step."""
        if sliding_window not in self._pieces:
            self._pieces[sliding_window] = [
                block.cache.find_pieces(block.find_first_visible(sliding_window), block.stop)
                for block in self._blocks
                if block.num_new == 1
            ]
        return self._pieces[sliding_window]

    def _attend_tokens(
        self, span: Span, q: Tensor, keys: Tensor, values: Tensor | None, rule: SoftmaxRule
    ) -> Tensor:
        first = span.find_first_visible(rule.sliding_window)
        runs = span.cache.find_runs(first, span.stop)
        mask = self._find_mask(span, first, rule.sliding_window, q)
        y = compute_attention(
            q[:, span.start : span.end],
            _gather(keys, runs)[None],
            None if values is None else _gather(values, runs)[None],
            rule,
            mask,
            is_causal=mask is None,
        )
        return y[0]

    def _find_mask(self, span: Span, first: int, sliding_window: int | None, q: Tensor) -> Tensor | None:
        """Returns the (new tokens, keys from ``first`` on) additive mask, made once per step; None where plain
        causality from position 0 says it all."""
        if span.past == 0 and (sliding_window is None or sliding_window >= span.stop):
            return None
        key = (span.start, sliding_window)
        if key not in self._masks:
            queries = torch.arange(span.past, span.stop, device=q.device)[:, None]
            keys = torch.arange(first, span.stop, device=q.device)
            hidden = keys > queries
            if sliding_window is not None:
                hidden |= keys <= queries - sliding_window
            mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
            self._masks[key] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[key]


def _gather(cached: Tensor, runs: Sequence[slice]) -> Tensor:
    """Returns the rows in one piece; a view where they lie so."""
    return cached[runs[0]] if len(runs) == 1 else torch.cat([cached[run] for run in runs])
