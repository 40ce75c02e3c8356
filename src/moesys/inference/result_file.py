"""Results in a file of JSON lines, each written when its text is finished, which a later run goes on with.

A line names its prompt, so that what is there counts in whatever order it came, and a long text holds up no other.
Beside the file lies a small one with the settings that the texts depend on: what was written under others is not mixed
with. Whatever ends a run leaves whole lines; a half line, as a power cut may leave, is dropped by the next run.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesys.checkpoint import write_text_atomic
from moesys.errors import GenerationError
from moesys.inference.batch import BatchResult
from moesys.inference.prompt_file import PromptLine

_IDENTITY_KEYS = ("line", "id", "prompt", "max_new_tokens")


class ResultFile:
    """The results of a file of prompts, open for more."""

    def __init__(self, descriptor: int, prompts: Sequence[PromptLine], done: Collection[int]) -> None:
        """done: which prompts, by index, the file holds results of."""
        self._descriptor = descriptor
        self._prompts = prompts
        self._done = set(done)

    @property
    def left(self) -> list[int]:
        """Which prompts have no result yet, in order."""
        return [index for index in range(len(self._prompts)) if index not in self._done]

    def add(self, index: int, result: BatchResult) -> None:
        """Writes the result of the prompt at ``index``, which has none yet."""
        assert index not in self._done
        _write_whole(self._descriptor, _render(self._prompts[index], result))
        self._done.add(index)


@contextmanager
def open_results(
    path: Path, prompts: Sequence[PromptLine], settings: Mapping[str, Any]
) -> Iterator[ResultFile]:
    """Opens the results of prompts, made if need be, for one process at a time.

    settings: JSON values that the texts depend on, beside the prompts.

    Raises `GenerationError` for a file that was written under other settings, for other prompts or by something else,
    and for one that another process is writing; it is not changed then.
    """
    with _open_locked(path) as descriptor:
        data = _read_all(descriptor)
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        settings_path = path.with_name(f"{path.name}.settings.json")
        done: list[int] = []
        if data:
            _require_same_settings(path, settings_path, settings)
            done = _find_done(path, lines, prompts)
        else:
            write_text_atomic(settings_path, f"{json.dumps(settings, indent=2)}\n")
        os.ftruncate(descriptor, len(whole))
        os.lseek(descriptor, 0, os.SEEK_END)
        yield ResultFile(descriptor, prompts, done)


@contextmanager
def _open_locked(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GenerationError(
                f"{path} is being written by another process; wait for it, or choose another --output"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read()


def _write_whole(descriptor: int, data: bytes) -> None:
    """Appends all of the bytes, or none that a later run would see."""
    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except BaseException:
        os.ftruncate(descriptor, start)
        raise


def _render(line: PromptLine, result: BatchResult) -> bytes:
    record = {
        **_identify(line),
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "finish_reason": result.finish_reason,
    }
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _identify(line: PromptLine) -> dict[str, Any]:
    """The keys of a result that say which prompt it belongs to."""
    named = {} if line.id is None else {"id": line.id}
    limited = {} if line.max_new_tokens is None else {"max_new_tokens": line.max_new_tokens}
    return {"line": line.number, **named, "prompt": line.prompt, **limited}


def _require_same_settings(path: Path, settings_path: Path, settings: Mapping[str, Any]) -> None:
    advice = "choose another --output, or remove it to begin again"
    if not settings_path.is_file():
        raise GenerationError(
            f"{path} has no {settings_path.name} beside it, so its origin is not known; {advice}"
        )
    try:
        found = json.loads(settings_path.read_bytes())
    except ValueError as error:
        raise GenerationError(f"{settings_path} is not JSON ({error}); {advice}") from None
    if not isinstance(found, dict):
        raise GenerationError(f"{settings_path} is not a JSON object; {advice}")
    given = json.loads(json.dumps(settings))
    other = [
        f"{name} was {json.dumps(found.get(name))} and is {json.dumps(given.get(name))}"
        for name in sorted({*found, *given})
        if found.get(name) != given.get(name)
    ]
    if other:
        raise GenerationError(f"{path} was written under other settings: {'; '.join(other)}; {advice}")


def _find_done(path: Path, lines: Sequence[bytes], prompts: Sequence[PromptLine]) -> list[int]:
    """Returns for each line of results the index of its prompt."""
    advice = "choose another --output, or give the prompts that it was begun with"
    indices = {prompt.number: index for index, prompt in enumerate(prompts)}
    done: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise GenerationError(f"{path}: line {number} is not JSON ({error}); {advice}") from None
        name = found.get("line") if isinstance(found, dict) else None
        index = indices.get(name) if type(name) is int else None
        if index is None:
            raise GenerationError(f"{path}: line {number} is not the result of any of the prompts; {advice}")
        if {key: found[key] for key in _IDENTITY_KEYS if key in found} != _identify(prompts[index]):
            raise GenerationError(
                f"{path}: the result in line {number} is not that of the prompt in line {name}; {advice}"
            )
        if index in done:
            raise GenerationError(
                f"{path}: line {number} and line {done[index]} are both results of the prompt in line {name}; "
                "remove one of them"
            )
        done[index] = number
    return list(done)
