"""A conversation with a model: a session that answers line by line and remembers the turns."""

from __future__ import annotations

from collections.abc import Iterator

from moesys.data import Tokenizer
from moesys.errors import GenerationError
from moesys.inference.chat_format import ChatFormat, Message
from moesys.inference.engine import Engine
from moesys.inference.generate import DEFAULT_NEW_TOKENS, Generation, Stop
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
    ) -> None:
        """``stop_ids`` end an answer beside the tokenizer's end of text."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._format = chat_format
        self._stop = Stop(chat_format.stop_strings, stop_ids)
        self._sampling = sampling
        half_context = engine.model.config.position_limit // 2
        self._max_new_tokens = max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, half_context))
        self._messages = [] if system is None else [Message("system", system)]
        self._last: Generation | None = None
        self._num_left_out = 0

    def answer(self, text: str) -> Iterator[str]:
        """Yields the assistant's turn in pieces; the turn joins the conversation when it is complete.

        When the conversation outgrows the model's positions, its oldest turns are left out of the prompt.
        """
        turns = [*self._messages, Message("user", text)]
        prompt_ids = self._fit_prompt(turns)
        self._last = Generation(
            self._engine,
            self._tokenizer,
            prompt_ids,
            self._max_new_tokens,
            self._sampling,
            self._stop,
        )
        pieces: list[str] = []
        for piece in self._last:
            pieces.append(piece)
            yield piece
        self._messages = [*turns, Message("assistant", "".join(pieces).strip())]

    def describe_last(self) -> str:
        """One line of figures on the last answer."""
        if self._last is None or self._last.stats is None:
            return ""
        left_out = f"; the oldest {self._num_left_out} messages did not fit" if self._num_left_out else ""
        return f"{self._last.stats.describe()}{left_out}"

    def _fit_prompt(self, turns: list[Message]) -> list[int]:
        limit = self._engine.model.config.position_limit - self._max_new_tokens
        num_system = 1 if turns[0].role == "system" else 0
        prompt_ids: list[int] = []
        for first in range(num_system, len(turns), 2):
            prompt_ids = self._format.encode(turns[:num_system] + turns[first:], self._tokenizer)
            if len(prompt_ids) <= limit:
                self._num_left_out = first - num_system
                return prompt_ids
        raise GenerationError(
            f"the message needs {len(prompt_ids)} tokens and {self._max_new_tokens} are reserved for the answer, but "
            f"the model was made for {self._engine.model.config.position_limit}; write less or lower --max-new-tokens"
        )
