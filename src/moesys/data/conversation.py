"""A conversation: what a line of chat JSONL holds and what a chat template renders. Knows no tokens and no template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from moesys.data.sources import decode_utf8, parse_json_line, read_bytes
from moesys.errors import DataError

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Conversation:
    """Turns in order, with the tools and documents that were at hand."""

    name: str
    """Where it came from, for people."""
    messages: tuple[Mapping[str, Any], ...]
    """JSON objects with at least a ``role``."""
    tools: tuple[Any, ...] | None = None
    documents: tuple[Any, ...] | None = None

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the content, hexadecimal."""
        content = json.dumps([self.messages, self.tools, self.documents], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def answer_ids(self) -> list[int]:
        """Which messages are the assistant's."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def take(self, num_messages: int) -> Self:
        """Returns the conversation up to a message."""
        return replace(self, messages=self.messages[:num_messages])


def read_conversations(path: Path, name: str) -> Iterator[Conversation]:
    """Yields the conversation of every line of a JSONL file; blank lines are skipped.

    A line is an object with ``messages``: objects with ``role`` and ``content``, and with whatever else the template
    reads (``tool_calls``, ``reasoning_content`` …); ``tools`` and ``documents`` may stand beside it. ShareGPT's
    ``conversations`` of ``from`` and ``value`` are read as messages.

    Raises `DataError`, naming file, line and message, for a line that holds something else or no assistant's turn.
    """
    for number, line in enumerate(decode_utf8(read_bytes(path), path).split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield _parse(parse_json_line(line, place), f"{name}:{number}", place)


def _parse(record: dict[str, Any], name: str, place: str) -> Conversation:
    messages = _read_sharegpt(record, place) if "messages" not in record else record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: messages must be a list of at least one object with role and content")
    for index, message in enumerate(messages):
        _check_message(message, f"{place}: message {index}")
    conversation = Conversation(
        name, tuple(messages), _read_list(record, "tools", place), _read_list(record, "documents", place)
    )
    if not conversation.answer_ids:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{place}: there is no message with the role assistant (roles: {roles}), so there is nothing to learn; "
            "add an answer or remove the line"
        )
    return conversation


def _read_sharegpt(record: dict[str, Any], place: str) -> list[Any]:
    turns = record.get("conversations")
    if not isinstance(turns, list):
        raise DataError(
            f"{place}: there is no list 'messages' (keys: {', '.join(record) or 'none'}); a line of chat data is "
            '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
        )
    messages = []
    for index, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker not in _SHAREGPT_ROLES or "value" not in turn:
            raise DataError(
                f"{place}: turn {index} of conversations must have value and from, one of "
                f"{', '.join(_SHAREGPT_ROLES)}, got {speaker!r}; write other roles as messages with role and content"
            )
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": turn["value"]})
    return messages


def _check_message(message: object, place: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{place} must be an object with a role that is text")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise DataError(f"{place} ({message['role']}) has neither content nor tool_calls")
    if content is not None and not isinstance(content, str | list):
        raise DataError(f"{place}: content must be text or a list of parts, got {type(content).__name__}")
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} holds a lone surrogate, which UTF-8 cannot hold ({error.reason})") from None


def _read_list(record: dict[str, Any], key: str, place: str) -> tuple[Any, ...] | None:
    value = record.get(key)
    if value is not None and not isinstance(value, list):
        raise DataError(f"{place}: {key} must be a list, got {type(value).__name__}")
    return None if value is None else tuple(value)
