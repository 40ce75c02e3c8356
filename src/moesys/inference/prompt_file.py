"""Prompts in a file of JSON lines, all checked before anything else is done."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesys.errors import GenerationError

_KEYS = ("prompt", "id", "max_new_tokens")
_MAX_PROBLEMS = 20


@dataclass(frozen=True)
class PromptLine:
    """A prompt of a file.

    number:          of its line, from 1.
    id:              the user's name for it, None without one.
    max_new_tokens:  None for the run's own.
    """

    number: int
    prompt: str
    id: str | int | None = None
    max_new_tokens: int | None = None

    @property
    def seed_name(self) -> str:
        """What tells its randomness from that of other prompts: its id, else its line, which does not change when lines
        are added at the end."""
        return f"line {self.number}" if self.id is None else f"id {json.dumps(self.id)}"


def read_prompts(path: Path) -> list[PromptLine]:
    """Reads a JSON lines file of objects with ``prompt`` and, as one likes, ``id`` (text or a number, each once) and
    ``max_new_tokens``. Empty lines are skipped.

    Raises `GenerationError` that lists every wrong line with its number, and for a file without prompts.
    """
    prompts: list[PromptLine] = []
    problems: list[str] = []
    for number, data in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not data.strip():
            continue
        try:
            prompts.append(_parse_line(number, data))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    problems += _find_repeated_ids(prompts)
    report_problems(path, problems)
    if not prompts:
        raise GenerationError(f'{path} holds no prompts; each line is an object such as {{"prompt": "..."}}')
    return prompts


def report_problems(path: Path, problems: list[str]) -> None:
    """Raises `GenerationError` for a prompt file with problems, of which the first are listed."""
    if not problems:
        return
    more = len(problems) - _MAX_PROBLEMS
    listed = [*problems[:_MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
    raise GenerationError("\n  ".join([f"{path} cannot be used; nothing was written:", *listed]))


def _parse_line(number: int, data: bytes) -> PromptLine:
    try:
        record = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"must be an object, is {_name_type(record)}")
    unknown = [name for name in record if name not in _KEYS]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known ones: {', '.join(_KEYS)}")
    prompt, name, max_new_tokens = (record.get(key) for key in _KEYS)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be text, is {_name_type(prompt) if 'prompt' in record else 'missing'}")
    if not _is_unicode(prompt):
        raise ValueError("prompt holds half of a surrogate pair, which is no character")
    if not (name is None or type(name) is int or (isinstance(name, str) and _is_unicode(name))):
        raise ValueError(f"id must be text or a whole number, is {_name_type(name)}")
    if not (max_new_tokens is None or (type(max_new_tokens) is int and max_new_tokens >= 1)):
        raise ValueError(f"max_new_tokens must be a whole number of 1 or more, is {max_new_tokens!r}")
    return PromptLine(number, prompt, name, max_new_tokens)


def _find_repeated_ids(prompts: list[PromptLine]) -> list[str]:
    first: dict[str, int] = {}
    problems: list[str] = []
    for line in prompts:
        if line.id is None:
            continue
        seen = first.setdefault(line.seed_name, line.number)
        if seen != line.number:
            problems.append(f"line {line.number}: id {line.id!r} is that of line {seen}; give each its own")
    return problems


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _name_type(value: Any) -> str:
    names = {bool: "true or false", dict: "an object", list: "a list", str: "text", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number")
