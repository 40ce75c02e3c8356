"""The bar that ``generate`` and ``chat`` show while a model is read."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_calls import Call

from moesys.cli import opening


@pytest.mark.parametrize("options", [(), ("--host-memory", "500MiB")])
@pytest.mark.parametrize("command", [("generate", "-p", "x", "--temperature", "0"), ("chat",)])
def test_the_bar_fills_and_vanishes_before_the_text(
    command: tuple[str, ...],
    options: tuple[str, ...],
    train: Call,
    tmp_path: Path,
    moesys_command: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert train("data.sequence_length=64").status == 0
    assert moesys_command("export", tmp_path / "run", "--to", tmp_path / "model").status == 0
    events: list[object] = []

    @contextmanager
    def show_bytes(what: str) -> Iterator[Callable[[int, int], None]]:
        events.append(what)
        yield lambda done, total: events.append((done, total))
        events.append("vanished")

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            events.append("text")
            return super().write(text)

    monkeypatch.setattr(opening, "show_bytes", show_bytes)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n"))
    monkeypatch.setattr(sys, "stdout", Output())
    name, *others = command
    assert moesys_command(name, tmp_path / "model", *others, "-n", "2", *options).status == 0
    end = events.index("vanished")
    first, *counts = events[:end]
    assert first == "loading"
    done, total = counts[-1]  # type: ignore[misc]
    assert done == total > 0
    assert set(events[end + 1 :]) == {"text"}
