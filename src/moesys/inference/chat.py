"""Conversations as prompts: a model's own chat template, run in a sandbox, or a plain transcript."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moesys.errors import ModelFormatError

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
        template = standalone.read_text(encoding="utf-8") if standalone.exists() else keys.get("chat_template")
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
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(self.template).render(
                messages=[m._asdict() for m in messages], add_generation_prompt=True, **self.special_tokens
            )
        except TemplateError as error:
            raise ModelFormatError(f"the chat template cannot render this conversation: {error}") from None


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
