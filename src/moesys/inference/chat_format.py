"""How a conversation becomes a prompt: through a model's own chat template, or as a plain transcript."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from moesys.checkpoint.text_model import read_chat_templates
from moesys.data import ChatTemplate, ContentGuard, Conversation, Tokenizer


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes a prompt.

    template:      None writes a transcript of ``User:`` and ``Assistant:`` turns.
    stop_strings:  what ends the assistant's turn beside the end-of-text token.
    """

    template: ChatTemplate | None
    stop_strings: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path, template: str | None = None) -> Self:
        """Reads the chat template of a model folder or packed file; without one the transcript format is returned.

        template: the name of one of several; None takes ``default``. Raises `ModelFormatError` for a template that is
        none or does not exist, and `DataError` for a ``tokenizer_config.json`` that cannot be read.
        """
        found = read_chat_templates(path).choose(template)
        return cls(found, ("\nUser:",) if found is None else ())

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the prompt that asks for the assistant's next turn. Raises `ModelFormatError`."""
        if self.template is None:
            turns = "".join(f"{m.role.capitalize()}: {m.content}\n" for m in messages)
            return f"{turns}Assistant:"
        conversation = Conversation("chat", tuple(m._asdict() for m in messages))
        return self.template.render(conversation, add_generation_prompt=True).text

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Returns the prompt's tokens. Names of special tokens stand for these where the template writes them; in
        the content of a message they are ordinary text, so that nobody can forge a turn. Raises `ModelFormatError`.
        """
        if self.template is None:
            return [tokenizer.end_of_text_id, *tokenizer.encode(self.render(messages))]
        guard = ContentGuard(tokenizer)
        guarded = [m._replace(content=guard.mark(m.content)) for m in messages]
        return guard.encode(self.render(guarded))
