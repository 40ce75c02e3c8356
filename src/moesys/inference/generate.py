"""Text generation for one sequence on top of the engine: prefill once, then a token at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from moesys.data import Tokenizer
from moesys.errors import GenerationError
from moesys.inference.engine import Engine, SequenceStep
from moesys.inference.sampling import SamplingParams, sample_token
from moesys.inference.text import TextStream


class FinishReason(StrEnum):
    """Why a generation ended."""

    END_OF_TEXT = "end_of_text"
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True)
class GenerationStats:
    """How fast a generation ran."""

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


class Generation:
    """A generation in progress: iterate over it for pieces of text, then read ``stats``."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingParams,
        stop_strings: Sequence[str],
    ) -> None:
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
        self._stream = TextStream(tokenizer.decode, stop_strings)
        self.stats: GenerationStats | None = None
        """Set when the iteration has ended."""

    @property
    def new_token_ids(self) -> list[int]:
        """The tokens generated so far, the end-of-text token included."""
        return self._ids[self._num_prompt :]

    def __iter__(self) -> Iterator[str]:
        sequence_id = self._engine.open_sequence(self._limit)
        try:
            start = time.perf_counter()
            self._extend(sequence_id, 0)
            prefill_end = time.perf_counter()
            while True:
                reason = self._find_finish()
                if reason is not FinishReason.END_OF_TEXT and (piece := self._stream.push(self._ids[-1])):
                    yield piece
                reason = FinishReason.STOP_STRING if self._stream.is_stopped else reason
                if reason is not None:
                    break
                self._extend(sequence_id, len(self._ids) - 1)
            if rest := self._stream.finish():
                yield rest
            decode_s = time.perf_counter() - prefill_end
            self.stats = GenerationStats(
                self._num_prompt, len(self._ids) - self._num_prompt, prefill_end - start, decode_s, reason
            )
        finally:
            self._engine.close_sequence(sequence_id)

    def _extend(self, sequence_id: int, start: int) -> None:
        """Runs the tokens from ``start`` on and draws the next one."""
        [logits_TV] = self._engine.step([SequenceStep(sequence_id, start, self._ids[start:])])
        self._ids.append(sample_token(logits_TV[-1], self._sampling, len(self._ids), self._ids))

    def _find_finish(self) -> FinishReason | None:
        if self._ids[-1] == self._tokenizer.end_of_text_id:
            return FinishReason.END_OF_TEXT
        return FinishReason.LENGTH if len(self._ids) >= self._limit else None


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    sampling: SamplingParams | None = None,
    stop_strings: Sequence[str] = (),
) -> Generation:
    """Continues a text as if it were the beginning of a document. Iterate over the result for pieces of text."""
    prompt_ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
    return Generation(
        engine, tokenizer, prompt_ids, max_new_tokens, sampling or SamplingParams(), stop_strings
    )
