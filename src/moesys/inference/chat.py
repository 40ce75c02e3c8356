"""A conversation with a model: a session that answers line by line and remembers the turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moesys.data import Tokenizer
from moesys.errors import GenerationError
from moesys.inference.chat_format import ChatFormat, Message
from moesys.inference.continuation import require_new_tokens
from moesys.inference.engine import Engine
from moesys.inference.generate import (
    DEFAULT_NEW_TOKENS,
    PREFILL_TOKENS,
    Generation,
    GenerationStats,
    Stop,
)
from moesys.inference.sampling import SamplingParams


class ChatSession:
    """A conversation with a model that has its own memory of the turns."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        sampling: SamplingParams,
        max_new_tokens: int | None,
        system: str | None = None,
        stop_ids: frozenset[int] = frozenset(),
        *,
        context: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        on_first_token: Callable[[], None] = lambda: None,
    ) -> None:
        """
        max_new_tokens:  of an answer; None for what `choose_answer_tokens` says.
        stop_ids:        end an answer beside the tokenizer's end of text.
        context:         tokens of conversation and answer together at most; None for as many as the model was made for.
        prefill_tokens:  of a prompt in one pass, which bounds the memory that it needs.
        on_first_token:  is called for each answer when its prompt is computed and the first token drawn.

        Raises what `choose_context` and `choose_answer_tokens` raise.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._format = chat_format
        self._stop = Stop(chat_format.stop_strings, stop_ids)
        self._sampling = sampling
        self._context = choose_context(context, engine.model.config.position_limit)
        self._max_new_tokens = choose_answer_tokens(max_new_tokens, self._context)
        self._messages = [] if system is None else [Message("system", system)]
        self._last: Generation | None = None
        self._num_left_out = 0
        self._prefill_tokens = prefill_tokens
        self._on_first_token = on_first_token

    @property
    def last_stats(self) -> GenerationStats | None:
        """Of the last answer; None before it is complete."""
        return None if self._last is None else self._last.stats

    def answer(self, text: str) -> Iterator[str]:
        """Returns the assistant's turn, to be iterated over in pieces; it joins the conversation when it is complete.

        When the conversation outgrows the model's positions, its oldest turns are left out of the prompt. Raises
        `GenerationError` here for a text that does not fit alone, which is forgotten then; when iterated as
        `Generation` does.
        """
        turns = [*self._messages, Message("user", text)]
        return self._write(turns, self._fit_prompt(turns))

    def describe_last(self) -> str:
        """One line of figures on the last answer."""
        if self._last is None or self._last.stats is None:
            return ""
        left_out = f"; the oldest {self._num_left_out} messages did not fit" if self._num_left_out else ""
        return f"{self._last.stats.describe()}{left_out}"

    def _write(self, turns: list[Message], prompt_ids: list[int]) -> Iterator[str]:
        self._last = Generation(
            self._engine,
            self._tokenizer,
            prompt_ids,
            self._max_new_tokens,
            self._sampling,
            self._stop,
            prefill_tokens=self._prefill_tokens,
            on_first_token=self._on_first_token,
        )
        pieces: list[str] = []
        for piece in self._last:
            pieces.append(piece)
            yield piece
        self._messages = [*turns, Message("assistant", "".join(pieces).strip())]

    def _fit_prompt(self, turns: list[Message]) -> list[int]:
        limit = self._context - self._max_new_tokens
        num_system = 1 if turns[0].role == "system" else 0
        prompt_ids: list[int] = []
        for first in range(num_system, len(turns), 2):
            prompt_ids = self._format.encode(turns[:num_system] + turns[first:], self._tokenizer)
            if len(prompt_ids) <= limit:
                self._num_left_out = first - num_system
                return prompt_ids
        raise GenerationError(
            f"the message needs {len(prompt_ids)} tokens and {self._max_new_tokens} are reserved for the answer, but "
            f"the context ends at {self._context}; write less or lower --max-new-tokens"
        )


def choose_context(asked: int | None, position_limit: int) -> int:
    """Returns the tokens of a conversation: those asked for, else all that the model was made for. Raises
    `GenerationError` for more than these or fewer than 2."""
    if asked is None:
        return position_limit
    if not 2 <= asked <= position_limit:
        raise GenerationError(
            f"context ({asked}) must be 2 to {position_limit}, which the model was made for"
        )
    return asked


def choose_answer_tokens(asked: int | None, context: int) -> int:
    """Returns the tokens that are kept free for an answer: those asked for, else 128 or half of a small context. Raises
    `GenerationError` for fewer than one, or for so many that no message fits beside them."""
    if asked is None:
        return max(1, min(DEFAULT_NEW_TOKENS, context // 2))
    require_new_tokens(asked)
    if asked >= context:
        raise GenerationError(
            f"max_new_tokens ({asked}) must be less than the context ({context}), which holds the messages too; lower "
            "it or raise the context"
        )
    return asked
