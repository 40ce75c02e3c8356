"""Results in a file of JSON lines, in the order of the prompts however they finish, which a later run goes on with.

Beside it lies a small file with the settings that the texts depend on: what was written under other settings is not
mixed with. Whatever ends a run leaves whole lines; a half line, as a power cut may leave, is dropped by the next run.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesys.checkpoint import write_text_atomic
from moesys.errors import GenerationError
from moesys.inference.batch import BatchResult
from moesys.inference.prompt_file import PromptLine


class ResultFile:
    """The results of a file of prompts, open for more.

    num_done: of the first prompts, whose results it holds.
    """

    def __init__(self, descriptor: int, prompts: Sequence[PromptLine], num_done: int) -> None:
        self._descriptor = descriptor
        self._prompts = prompts
        self._held: dict[int, BatchResult] = {}
        self.num_done = num_done

    def add(self, index: int, result: BatchResult) -> None:
        """Takes the result of the prompt at ``index``; it is written when those of all earlier prompts are."""
        self._held[index] = result
        while (ready := self._held.pop(self.num_done, None)) is not None:
            _write_whole(self._descriptor, _render(self._prompts[self.num_done], ready))
            self.num_done += 1


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
        if data:
            _require_same_settings(path, settings_path, settings)
            _require_same_prompts(path, lines, prompts)
        else:
            write_text_atomic(settings_path, f"{json.dumps(settings, indent=2)}\n")
        os.ftruncate(descriptor, len(whole))
        os.lseek(descriptor, 0, os.SEEK_END)
        yield ResultFile(descriptor, prompts, len(lines))


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


def _require_same_prompts(path: Path, lines: Sequence[bytes], prompts: Sequence[PromptLine]) -> None:
    advice = "choose another --output, or give the prompts that it was begun with"
    if len(lines) > len(prompts):
        raise GenerationError(f"{path} holds {len(lines)} results of {len(prompts)} prompts; {advice}")
    for number, (line, prompt) in enumerate(zip(lines, prompts, strict=False), start=1):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise GenerationError(f"{path}: line {number} is not JSON ({error}); {advice}") from None
        expected = _identify(prompt)
        named = isinstance(found, dict) and {key: found[key] for key in _identity_keys(found)}
        if named != expected:
            raise GenerationError(
                f"{path}: the result in line {number} is not that of the prompt in line {prompt.number}; {advice}"
            )


def _identity_keys(found: Mapping[str, Any]) -> list[str]:
    return [key for key in ("line", "id", "prompt", "max_new_tokens") if key in found]
