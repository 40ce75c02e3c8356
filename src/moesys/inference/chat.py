"""Conversations: as prompts through a model's own chat template, run in a sandbox, or a plain transcript; and as a
session that answers line by line."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moesys.data import Tokenizer, TokenizerConfig
from moesys.errors import GenerationError, ModelFormatError
from moesys.inference.engine import Engine
from moesys.inference.generate import DEFAULT_NEW_TOKENS, Generation, Stop
from moesys.inference.sampling import SamplingParams

_MAX_TEMPLATE_CHARS = 65536
_TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes a prompt.

    A template cannot reach Python objects or files; a hostile one can still waste time and memory.

    template:      a Jinja2 chat template; None writes a transcript of ``User:`` and ``Assistant:`` turns.
    stop_strings:  what ends the assistant's turn beside the end-of-text token.
    special_tokens: ``bos_token`` and ``eos_token`` as templates expect them.
    """

    template: str | None
    stop_strings: tuple[str, ...]
    special_tokens: dict[str, str]

    @classmethod
    def load(cls, folder: Path) -> ChatFormat:
        """Reads a model folder's chat template; without one the transcript format is returned.

        Raises `ModelFormatError` for a template that is none, and `DataError` for a ``tokenizer_config.json`` that
        cannot be read.
        """
        declared = TokenizerConfig.load(folder)
        standalone = folder / "chat_template.jinja"
        template = _read_text(standalone) if standalone.exists() else declared.chat_template
        if template is not None and (not isinstance(template, str) or len(template) > _MAX_TEMPLATE_CHARS):
            raise ModelFormatError(
                f"the chat template of {folder} must be one text of at most {_MAX_TEMPLATE_CHARS} characters"
            )
        tokens = {"bos_token": declared.bos_token, "eos_token": declared.eos_token}
        stop = () if template is not None else ("\nUser:",)
        return cls(template, stop, {name: token for name, token in tokens.items() if token is not None})

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the prompt that asks for the assistant's next turn. Raises `ModelFormatError`."""
        if self.template is None:
            turns = "".join(f"{m.role.capitalize()}: {m.content}\n" for m in messages)
            return f"{turns}Assistant:"
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        try:
            return environment.from_string(self.template).render(
                messages=[m._asdict() for m in messages],
                add_generation_prompt=True,
                raise_exception=_raise,
                **self.special_tokens,
            )
        except _TEMPLATE_FAILURES as error:
            raise ModelFormatError(f"the chat template cannot render this conversation: {error}") from None

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Returns the prompt's tokens. Names of special tokens stand for these where the template writes them; in
        the content of a message they are ordinary text, so that nobody can forge a turn. Raises `ModelFormatError`.
        """
        if self.template is None:
            return [tokenizer.end_of_text_id, *tokenizer.encode(self.render(messages))]
        # A mark inside each name keeps it from being one; the prompt is cut there before it is encoded.
        mark = f"break{secrets.token_hex(8)}"
        names = "|".join(map(re.escape, tokenizer.special_names)) or "(?!)"
        starts_of_names = re.compile(f"(?={names})(.)", re.DOTALL)
        guarded = [m._replace(content=starts_of_names.sub(rf"\1{mark}", m.content)) for m in messages]
        pieces = self.render(guarded).split(mark)
        return [token_id for piece in pieces for token_id in tokenizer.encode_with_special_tokens(piece)]


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
        half_context = engine.model.config.max_positions // 2
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
        limit = self._engine.model.config.max_positions - self._max_new_tokens
        num_system = 1 if turns[0].role == "system" else 0
        prompt_ids: list[int] = []
        for first in range(num_system, len(turns), 2):
            prompt_ids = self._format.encode(turns[:num_system] + turns[first:], self._tokenizer)
            if len(prompt_ids) <= limit:
                self._num_left_out = first - num_system
                return prompt_ids
        raise GenerationError(
            f"the message needs {len(prompt_ids)} tokens and {self._max_new_tokens} are reserved for the answer, but "
            f"the model was made for {self._engine.model.config.max_positions}; write less or lower --max-new-tokens"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelFormatError(f"{path} is not UTF-8 text: {error}") from None


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
