"""Text generation for one sequence on top of the engine: the prompt in bounded passes, then a token at a time.

What a text is and when it ends is `continuation`'s; many at once are `batch`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moesys.data import Tokenizer
from moesys.errors import GenerationError
from moesys.inference.continuation import Continuation, FinishReason, Stop
from moesys.inference.engine import Engine
from moesys.inference.sampling import SamplingParams

DEFAULT_NEW_TOKENS = 128

PREFILL_TOKENS = 512
"""Enough rows for matrix products to run at their full rate; what they need besides weights stays small."""


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
        on_first_token: Callable[[], None] = lambda: None,
    ) -> None:
        """
        prefill_tokens:  of the prompt in one pass, which bounds the memory that it needs.
        on_first_token:  is called when the prompt is computed and the first token drawn.
        """
        if prefill_tokens < 1:
            raise GenerationError(f"prefill_tokens ({prefill_tokens}) must be 1 or more")
        self._engine = engine
        self._continuation = Continuation(tokenizer, prompt_ids, max_new_tokens, sampling, stop)
        self._prefill_tokens = prefill_tokens
        self._on_first_token = on_first_token
        self.stats: GenerationStats | None = None
        """Set when the iteration has ended."""

    @property
    def new_token_ids(self) -> list[int]:
        """The tokens generated so far, the end-of-text token included."""
        return self._continuation.new_token_ids

    def __iter__(self) -> Iterator[str]:
        text = self._continuation
        if text.num_new:
            raise GenerationError("this generation was iterated before; start a new one")
        sequence_id = self._engine.open_sequence(text.max_tokens)
        prefill_s = decode_s = 0.0
        try:
            while text.finish_reason is None:
                begin = time.perf_counter()
                step = text.make_step(sequence_id, self._prefill_tokens)
                [[logits_V]] = self._engine.step([step])
                piece = text.take(step, logits_V)
                if text.num_new <= 1:
                    prefill_s += time.perf_counter() - begin
                else:
                    decode_s += time.perf_counter() - begin
                if text.num_new == 1:
                    self._on_first_token()
                if piece:
                    yield piece
        finally:
            self._engine.close_sequence(sequence_id)
        self.stats = GenerationStats(text.num_prompt, text.num_new, prefill_s, decode_s, text.finish_reason)


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
    prompt_ids = encode_prompt(tokenizer, prompt)
    if max_new_tokens is None:
        max_new_tokens = choose_new_tokens(len(prompt_ids), engine.model.config.position_limit)
    return Generation(
        engine,
        tokenizer,
        prompt_ids,
        max_new_tokens,
        sampling or SamplingParams(),
        stop or Stop(),
        prefill_tokens=prefill_tokens,
    )


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the tokens of a text that begins a document."""
    return [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]


def choose_new_tokens(num_prompt: int, position_limit: int) -> int:
    """Returns how many tokens to write after a prompt where nobody says: 128, or what the context leaves."""
    return max(1, min(DEFAULT_NEW_TOKENS, position_limit - num_prompt))
