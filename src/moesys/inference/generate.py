"""Text generation for one sequence on top of the engine: the prompt in bounded passes, then a token at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from moesys.data import Tokenizer
from moesys.errors import GenerationError
from moesys.inference.engine import Engine, SequenceStep
from moesys.inference.sampling import SamplingParams, sample_token
from moesys.inference.text import TextStream

DEFAULT_NEW_TOKENS = 128

PREFILL_TOKENS = 512
"""Enough rows for matrix products to run at their full rate; what they need besides weights stays small."""


class FinishReason(StrEnum):
    """Why a generation ended."""

    END_OF_TEXT = "end_of_text"
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True)
class GenerationStats:
    """How fast a generation ran; the time that the reader takes between pieces is not in it.

    prefill_s:  seconds until the first new token was drawn.
    decode_s:   seconds for the others.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    finish_reason: FinishReason

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens after the first per second."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 and self.new_tokens > 1 else 0.0

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.prompt_tokens} prompt tokens in {self.prefill_s:.2f} s, {self.new_tokens} new tokens at "
            f"{self.decode_tokens_per_s:.1f} tokens/s, ended by {self.finish_reason.replace('_', ' ')}"
        )


@dataclass(frozen=True)
class Stop:
    """What ends a text before its length does, beside the tokenizer's end of text."""

    strings: Sequence[str] = ()
    """The text ends before the first of them."""
    token_ids: Collection[int] = frozenset()
    """Further tokens that mean the end of text, and are not shown."""


class Generation:
    """A generation in progress: iterate over it, once, for pieces of text, then read ``stats``.

    Raises `GenerationError` here for settings that cannot be used, and when iterated for a prompt that does not fit
    the model or for logits that are not numbers.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingParams,
        stop: Stop,
        *,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """prefill_tokens: of the prompt in one pass, which bounds the memory that it needs."""
        if prefill_tokens < 1:
            raise GenerationError(f"prefill_tokens ({prefill_tokens}) must be 1 or more")
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens ({max_new_tokens}) must be 1 or more")
        if not prompt_ids:
            raise GenerationError("the prompt has no tokens; start it with the end-of-text token")
        self._engine = engine
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._num_prompt = len(prompt_ids)
        self._limit = len(prompt_ids) + max_new_tokens
        self._sampling = sampling
        self._prefill_tokens = prefill_tokens
        self._stream = TextStream(tokenizer.decode, stop.strings, prompt_ids)
        self._end_ids = {tokenizer.end_of_text_id, *stop.token_ids}
        self.stats: GenerationStats | None = None
        """Set when the iteration has ended."""

    @property
    def new_token_ids(self) -> list[int]:
        """The tokens generated so far, the end-of-text token included."""
        return self._ids[self._num_prompt :]

    def __iter__(self) -> Iterator[str]:
        if self.new_token_ids:
            raise GenerationError("this generation was iterated before; start a new one")
        sequence_id = self._engine.open_sequence(self._limit)
        try:
            prefill_s, decode_s = self._extend(sequence_id, 0), 0.0
            while True:
                reason = self._find_finish()
                if reason is not FinishReason.END_OF_TEXT and (piece := self._stream.push(self._ids[-1])):
                    yield piece
                if reason is not None or self._stream.is_stopped:
                    break
                decode_s += self._extend(sequence_id, len(self._ids) - 1)
            if rest := self._stream.finish():
                yield rest
        finally:
            self._engine.close_sequence(sequence_id)
        if reason is None or self._stream.is_stopped:
            reason = FinishReason.STOP_STRING
        self.stats = GenerationStats(self._num_prompt, len(self.new_token_ids), prefill_s, decode_s, reason)

    def _extend(self, sequence_id: int, start: int) -> float:
        """Runs the tokens from ``start`` on and draws the next one; returns the seconds that took."""
        begin = time.perf_counter()
        size = self._prefill_tokens
        last = start + (len(self._ids) - start - 1) // size * size
        for first in range(start, last, size):
            chunk = self._ids[first : first + size]
            self._engine.step([SequenceStep(sequence_id, first, chunk, num_logits=1)])
        [[logits_V]] = self._engine.step([SequenceStep(sequence_id, last, self._ids[last:], num_logits=1)])
        self._ids.append(sample_token(logits_V, self._sampling, len(self._ids), self._ids))
        return time.perf_counter() - begin

    def _find_finish(self) -> FinishReason | None:
        if self._ids[-1] in self._end_ids:
            return FinishReason.END_OF_TEXT
        return FinishReason.LENGTH if len(self._ids) >= self._limit else None


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop: Stop | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
) -> Generation:
    """Continues a text as if it were the beginning of a document. Iterate over the result for pieces of text.

    max_new_tokens: None writes 128, or fewer where the model's context leaves less.
    prefill_tokens: of the prompt in one pass, which bounds the memory that it needs.
    """
    prompt_ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
    if max_new_tokens is None:
        max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, engine.model.config.position_limit - len(prompt_ids)))
    return Generation(
        engine,
        tokenizer,
        prompt_ids,
        max_new_tokens,
        sampling or SamplingParams(),
        stop or Stop(),
        prefill_tokens=prefill_tokens,
    )
