"""Many prompts through one engine: up to a number of texts at once, a finished one makes room for the next.

Each step runs one token of every text that is being written and, beside them, the next pieces of newcomers' prompts: at
most `prefill_tokens` tokens, so that no text waits long. A text's tokens are those that it would get alone, whatever
runs beside it: its prompt is cut alike, its randomness is its own, and no kernel mixes rows. Knows nothing of files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moesys.data import Tokenizer
from moesys.errors import GenerationError
from moesys.inference.continuation import Continuation, FinishReason, Stop
from moesys.inference.engine import Engine, SequenceStep
from moesys.inference.generate import PREFILL_TOKENS
from moesys.inference.sampling import SamplingParams

MAX_SEQUENCES = 32
"""Texts that are written at once by default: each weight that is read then serves many of them."""


@dataclass(frozen=True)
class BatchPrompt:
    """What one text begins with, and how it goes on."""

    token_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams


@dataclass(frozen=True)
class BatchResult:
    """A finished text.

    index:       of its prompt.
    text:        what was written, without the prompt.
    new_tokens:  written, the end-of-text token included.
    """

    index: int
    text: str
    prompt_tokens: int
    new_tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class BatchStats:
    """How fast a batch runs; the time that the reader takes between results is not in it."""

    num_steps: int = 0
    prompt_tokens: int = 0
    """Run so far, of all prompts."""
    new_tokens: int = 0
    seconds: float = 0.0

    @property
    def new_tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.prompt_tokens} prompt tokens and {self.new_tokens} new ones in {self.seconds:.2f} s "
            f"({self.new_tokens_per_s:.1f} new tokens/s), {self.num_steps} steps"
        )


@dataclass
class _Open:
    """A text that is being written."""

    index: int
    sequence_id: int
    continuation: Continuation
    text: str = ""


class BatchRun:
    """A batch in progress: iterate over it, once, for results as they finish; ``stats`` grow with it.

    Raises `GenerationError` here for a prompt that does not fit the model or the engine's pages, naming its index; when
    iterated for logits that are not numbers.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: Sequence[BatchPrompt],
        stop: Stop,
        *,
        max_sequences: int = MAX_SEQUENCES,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """max_sequences: texts at once, fewer where pages are too few; prefill_tokens: of prompts in one step."""
        if max_sequences < 1 or prefill_tokens < 1:
            raise GenerationError(
                f"max_sequences ({max_sequences}) and prefill_tokens ({prefill_tokens}) must be 1 or more"
            )
        self._engine = engine
        self._max_sequences = max_sequences
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[tuple[int, Continuation]] = deque()
        self._open: list[_Open] = []
        self.stats = BatchStats()
        for index, prompt in enumerate(prompts):
            try:
                text = Continuation(tokenizer, prompt.token_ids, prompt.max_new_tokens, prompt.sampling, stop)
                engine.require_fit(text.max_tokens)
            except GenerationError as error:
                raise GenerationError(f"prompt {index}: {error}") from None
            self._waiting.append((index, text))

    def __iter__(self) -> Iterator[BatchResult]:
        longest = sorted((text.max_tokens for _, text in self._waiting), reverse=True)
        self._engine.make_room(longest[: self._max_sequences])
        try:
            while self._waiting or self._open:
                begin = time.perf_counter()
                self._admit()
                finished = self._step()
                self._count_time(begin)
                yield from finished
        finally:
            for text in self._open:
                self._engine.close_sequence(text.sequence_id)
            self._open.clear()
            self._waiting.clear()

    def _admit(self) -> None:
        while self._waiting and len(self._open) < self._max_sequences:
            index, continuation = self._waiting[0]
            if self._open and not self._engine.has_room(continuation.max_tokens):
                return
            self._waiting.popleft()
            sequence_id = self._engine.open_sequence(continuation.max_tokens)
            self._open.append(_Open(index, sequence_id, continuation))

    def _step(self) -> list[BatchResult]:
        """Runs the next tokens and returns what they finish; its sequences are closed."""
        chosen = self._choose()
        all_logits = self._engine.step([step for _, step in chosen])
        for (text, step), [logits_V] in zip(chosen, all_logits, strict=True):
            text.text += text.continuation.take(step, logits_V)
        self._count_tokens(chosen)
        return [
            self._finish(text) for text in list(self._open) if text.continuation.finish_reason is not None
        ]

    def _choose(self) -> list[tuple[_Open, SequenceStep]]:
        """Returns the next tokens of all texts but the newcomers whose prompt's next piece is too long for the rest of
        this step."""
        chosen: list[tuple[_Open, SequenceStep]] = []
        left = self._prefill_tokens
        for text in self._open:
            step = text.continuation.make_step(text.sequence_id, self._prefill_tokens)
            if text.continuation.num_new == 0:
                if len(step.token_ids) > left:
                    continue
                left -= len(step.token_ids)
            chosen.append((text, step))
        return chosen

    def _finish(self, text: _Open) -> BatchResult:
        self._engine.close_sequence(text.sequence_id)
        self._open.remove(text)
        continuation = text.continuation
        assert continuation.finish_reason is not None
        return BatchResult(
            text.index, text.text, continuation.num_prompt, continuation.num_new, continuation.finish_reason
        )

    def _count_tokens(self, chosen: Sequence[tuple[_Open, SequenceStep]]) -> None:
        num_drawn = sum(text.continuation.num_new > 0 for text, _ in chosen)
        num_prompt = sum(
            len(step.token_ids) for text, step in chosen if step.start < text.continuation.num_prompt
        )
        self.stats = replace(
            self.stats,
            num_steps=self.stats.num_steps + 1,
            prompt_tokens=self.stats.prompt_tokens + num_prompt,
            new_tokens=self.stats.new_tokens + num_drawn,
        )

    def _count_time(self, begin: float) -> None:
        self.stats = replace(self.stats, seconds=self.stats.seconds + time.perf_counter() - begin)
