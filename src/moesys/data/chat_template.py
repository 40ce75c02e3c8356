"""The chat templates of a model folder: which there are, which one counts, and how it renders a conversation.

Knows where transformers keeps templates and what it gives them; does not know tokens. The idea: the same files and the
same conversation give the same text as transformers' ``apply_chat_template``, and a hostile template gives an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from moesys.data.conversation import Conversation
from moesys.data.template_sandbox import Rendered, TemplateSandbox
from moesys.data.tokenizer_config import TokenizerConfig
from moesys.data.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_FOLDER,
    CHAT_TEMPLATE_JSON_FILE,
    read_tokenizer_files,
)
from moesys.errors import DataError, ModelFormatError

MAX_TEMPLATE_CHARS = 65536
_DEFAULT, _TOOL_USE = "default", "tool_use"
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """One Jinja2 template, which may come from anybody.

    It runs in jinja2's immutable sandbox and in a process of its own with bounded time and memory: it reaches no Python
    object, file or network, and one that loops or grows without end is stopped.
    """

    text: str
    place: str
    """Where it was found, for messages."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """``bos_token``, ``eos_token`` … as templates expect them."""
    sandbox: TemplateSandbox = field(default_factory=TemplateSandbox, compare=False, repr=False)

    def render(
        self,
        conversation: Conversation,
        *,
        add_generation_prompt: bool,
        now: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Writes a conversation.

        add_generation_prompt: whether the text ends where the assistant's next turn begins.
        now: an ISO date for templates that write today's; None takes the clock's.
        variables: more of what a template may read, such as ``enable_thinking``.

        Raises `ModelFormatError` where the template fails or was stopped.
        """
        values = {
            **self.special_tokens,
            **(variables or {}),
            "messages": [_complete_message(message) for message in conversation.messages],
            "tools": None if conversation.tools is None else list(conversation.tools),
            "documents": None if conversation.documents is None else list(conversation.documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self.sandbox.render(self.text, values, now)
        except ModelFormatError as error:
            raise ModelFormatError(
                f"the chat template cannot render this conversation: {error} ({self.place}; change the conversation, "
                "or the template)"
            ) from None


@dataclass(frozen=True)
class ChatTemplates:
    """All templates of a folder, by name; most folders have one, named ``default``, or none."""

    texts: dict[str, str]
    place: str
    special_tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads ``chat_template.jinja`` and ``additional_chat_templates/``, else what ``tokenizer_config.json`` holds,
        else ``chat_template.json``.

        Raises `ModelFormatError` for a template that is none, and `DataError` for files that cannot be read.
        """
        return cls.parse(read_tokenizer_files(folder), str(folder))

    @classmethod
    def parse(cls, files: Mapping[str, bytes], place: str) -> Self:
        """Reads the templates among a tokenizer's files. Raises like `load`."""
        declared = TokenizerConfig.parse(files, place)
        texts = _find_files(files, place) or _find_declared(declared.chat_template, place)
        if not texts and CHAT_TEMPLATE_JSON_FILE in files:
            texts = _find_declared(_parse_template_json(files[CHAT_TEMPLATE_JSON_FILE], place), place)
        return cls(texts, place, declared.special_tokens)

    def choose(self, name: str | None = None, *, with_tools: bool = False) -> ChatTemplate | None:
        """Returns the template of that name; without a name, ``tool_use`` for conversations with tools where there is
        one, else ``default``. None where the folder has no template and none was asked for.

        Raises `ModelFormatError` for a name that does not exist, or where there is no default.
        """
        if not self.texts and name is None:
            return None
        if name is None:
            name = _TOOL_USE if with_tools and _TOOL_USE in self.texts else _DEFAULT
        if name not in self.texts:
            found = ", ".join(sorted(self.texts)) or "none"
            raise ModelFormatError(f"{self.place} has no chat template {name!r}; choose one of: {found}")
        place = f"{self.place}, template {name!r}" if len(self.texts) > 1 else self.place
        return ChatTemplate(self.texts[name], place, self.special_tokens)


def read_template(file: Path) -> str:
    """Reads a template from a file of its own. Raises `ModelFormatError` or `DataError`."""
    try:
        contents = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: the chat template cannot be read ({error.strerror})") from None
    return _require_text(_decode(contents, str(file)), str(file))


def _find_files(files: Mapping[str, bytes], place: str) -> dict[str, str]:
    names = {CHAT_TEMPLATE_FILE: _DEFAULT} | {
        name: PurePosixPath(name).stem for name in files if name.startswith(f"{CHAT_TEMPLATE_FOLDER}/")
    }
    return {
        template: _require_text(_decode(files[name], f"{place}/{name}"), f"{place}/{name}")
        for name, template in names.items()
        if name in files
    }


def _find_declared(declared: object, place: str) -> dict[str, str]:
    """Reads one text, a mapping from names to texts, or a list of objects with ``name`` and ``template``."""
    if declared is None:
        return {}
    if isinstance(declared, list):
        try:
            declared = {entry["name"]: entry["template"] for entry in declared}
        except (TypeError, KeyError):
            raise ModelFormatError(
                f"the chat template of {place} is a list, whose entries must be objects with name and template"
            ) from None
    if not isinstance(declared, dict):
        return {_DEFAULT: _require_text(declared, place)}
    return {str(name): _require_text(text, f"{place}, template {name!r}") for name, text in declared.items()}


def _parse_template_json(contents: bytes, place: str) -> object:
    try:
        return json.loads(contents.decode())["chat_template"]
    except (ValueError, RecursionError, TypeError, KeyError):
        raise ModelFormatError(
            f"{place}/{CHAT_TEMPLATE_JSON_FILE} must be a JSON object with the key chat_template"
        ) from None


def _require_text(text: object, place: str) -> str:
    if not isinstance(text, str) or len(text) > MAX_TEMPLATE_CHARS:
        raise ModelFormatError(
            f"the chat template of {place} must be one text of at most {MAX_TEMPLATE_CHARS} characters"
        )
    return text


def _decode(contents: bytes, place: str) -> str:
    """Returns text with newlines as text files have them in Python, which is how transformers reads templates."""
    try:
        return contents.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ModelFormatError(f"{place} is not UTF-8 text: {error}") from None


def _complete_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what is None and gives reasoning under the names that templates read, as transformers does."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[key] for key in _REASONING if key in present), None)
    return (
        present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}
    )
