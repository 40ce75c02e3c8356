"""Conversations: as prompts through a model's own chat template, run in a sandbox, or a plain transcript; and as a
session that answers line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moesys.data import Tokenizer
from moesys.errors import GenerationError, ModelFormatError
from moesys.inference.engine import Engine
from moesys.inference.generate import Generation
from moesys.inference.sampling import SamplingParams

_MAX_TEMPLATE_CHARS = 65536


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes a prompt.

    template:      a Jinja2 chat template; None writes a transcript of ``User:`` and ``Assistant:`` turns.
    stop_strings:  what ends the assistant's turn beside the end-of-text token.
    special_tokens: ``bos_token`` and ``eos_token`` as templates expect them.
    """

    template: str | None
    stop_strings: tuple[str, ...]
    special_tokens: dict[str, str]

    @classmethod
    def load(cls, folder: Path) -> ChatFormat:
        """Reads a model folder's chat template; without one the transcript format is returned."""
        path = folder / "tokenizer_config.json"
        keys = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        standalone = folder / "chat_template.jinja"
        template = (
            standalone.read_text(encoding="utf-8") if standalone.exists() else keys.get("chat_template")
        )
        if template is not None and (not isinstance(template, str) or len(template) > _MAX_TEMPLATE_CHARS):
            raise ModelFormatError(
                f"the chat template of {folder} must be one text of at most {_MAX_TEMPLATE_CHARS} characters"
            )
        tokens = {name: keys[name] for name in ("bos_token", "eos_token") if isinstance(keys.get(name), str)}
        stop = () if template is not None else ("\nUser:",)
        return cls(template, stop, tokens)

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the prompt that asks for the assistant's next turn. Raises `ModelFormatError`."""
        if self.template is None:
            turns = "".join(f"{m.role.capitalize()}: {m.content}\n" for m in messages)
            return f"{turns}Assistant:"
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self.template).render(
                messages=[m._asdict() for m in messages],
                add_generation_prompt=True,
                raise_exception=_raise,
                **self.special_tokens,
            )
        except TemplateError as error:
            raise ModelFormatError(f"the chat template cannot render this conversation: {error}") from None


class ChatSession:
    """A conversation with a model that has its own memory of the turns."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        sampling: SamplingParams,
        max_new_tokens: int,
        system: str | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._format = chat_format
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._messages = [] if system is None else [Message("system", system)]
        self._last: Generation | None = None

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
            self._format.stop_strings,
        )
        pieces: list[str] = []
        for piece in self._last:
            pieces.append(piece)
            yield piece
        self._messages = [*turns, Message("assistant", "".join(pieces).strip())]

    def describe_last(self) -> str:
        """One line of figures on the last answer."""
        return "" if self._last is None or self._last.stats is None else self._last.stats.describe()

    def _fit_prompt(self, turns: list[Message]) -> list[int]:
        limit = self._engine.model.config.max_positions - self._max_new_tokens
        num_system = 1 if turns[0].role == "system" else 0
        prompt_ids: list[int] = []
        for first in range(num_system, len(turns), 2):
            prompt_ids = self._encode(turns[:num_system] + turns[first:])
            if len(prompt_ids) <= limit:
                return prompt_ids
        raise GenerationError(
            f"the message needs {len(prompt_ids)} tokens and {self._max_new_tokens} are reserved for the answer, but "
            f"the model was made for {self._engine.model.config.max_positions}; write less or lower --max-new-tokens"
        )

    def _encode(self, turns: list[Message]) -> list[int]:
        prompt = self._format.render(turns)
        if self._format.template is None:
            return [self._tokenizer.end_of_text_id, *self._tokenizer.encode(prompt)]
        return self._tokenizer.encode_with_special_tokens(prompt)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
