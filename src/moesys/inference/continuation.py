"""One text that is being continued: its tokens, what ends it, and what of it can be shown.

Knows nothing of who runs its tokens, or beside which others: the pieces in which its prompt is run and the tokens that
are drawn depend on nothing but itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from moesys.data import Tokenizer
from moesys.errors import GenerationError
from moesys.inference.engine import SequenceStep
from moesys.inference.sampling import SamplingParams, sample_token
from moesys.inference.text import TextStream


class FinishReason(StrEnum):
    """Why a generation ended."""

    END_OF_TEXT = "end_of_text"
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True)
class Stop:
    """What ends a text before its length does, beside the tokenizer's end of text."""

    strings: Sequence[str] = ()
    """The text ends before the first of them."""
    token_ids: Collection[int] = frozenset()
    """Further tokens that mean the end of text, and are not shown."""


def require_new_tokens(max_new_tokens: int) -> None:
    """Raises `GenerationError` for a text of no new tokens."""
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens ({max_new_tokens}) must be 1 or more")


class Continuation:
    """A prompt and the tokens that follow it. Raises `GenerationError` for settings that cannot be used."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingParams,
        stop: Stop,
    ) -> None:
        require_new_tokens(max_new_tokens)
        if not prompt_ids:
            raise GenerationError("the prompt has no tokens; start it with the end-of-text token")
        self._ids = list(prompt_ids)
        self._num_run = 0
        self._sampling = sampling
        self._stream = TextStream(tokenizer.decode, stop.strings, prompt_ids)
        self._end_ids = {tokenizer.end_of_text_id, *stop.token_ids}
        self.num_prompt = len(prompt_ids)
        self.max_tokens = len(prompt_ids) + max_new_tokens
        """Of prompt and text together."""
        self.finish_reason: FinishReason | None = None
        """Set by `take` with the last token."""

    @property
    def new_token_ids(self) -> list[int]:
        """The tokens drawn so far, the end-of-text token included."""
        return self._ids[self.num_prompt :]

    @property
    def num_new(self) -> int:
        return len(self._ids) - self.num_prompt

    def make_step(self, sequence_id: int, prefill_tokens: int) -> SequenceStep:
        """Returns the next tokens to run: one, or ``prefill_tokens`` of the prompt at most."""
        token_ids = self._ids[self._num_run : self._num_run + prefill_tokens]
        return SequenceStep(sequence_id, self._num_run, token_ids, num_logits=1)

    def take(self, step: SequenceStep, logits_V: Tensor) -> str:
        """Notes that a step was run, with (vocabulary,) logits of its last token; draws the next token when that was
        the last of all. Returns text that is now certain."""
        self._num_run += len(step.token_ids)
        if self._num_run < len(self._ids):
            return ""
        token_id = sample_token(logits_V, self._sampling, len(self._ids), self._ids)
        self._ids.append(token_id)
        is_end = token_id in self._end_ids
        piece = "" if is_end else self._stream.push(token_id)
        if is_end or self._stream.is_stopped or len(self._ids) == self.max_tokens:
            piece += self._stream.finish()
            self.finish_reason = FinishReason.END_OF_TEXT if is_end else FinishReason.LENGTH
            if self._stream.is_stopped:
                self.finish_reason = FinishReason.STOP_STRING
        return piece
