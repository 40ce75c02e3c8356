"""Ctrl-C as a request: the first one lets the step finish and the run save, the second one exits at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While entered, SIGINT and SIGTERM set ``is_requested``; a second one ends the process with status 130.

    Outside the main thread, where Python allows no handlers, it never fires.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._previous: dict[int, object] = {}
        self.is_requested = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyrefly: ignore

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            os._exit(130)
        self.is_requested = True
        # A stream refuses a write that interrupts its own write; the request counts all the same.
        with suppress(RuntimeError):
            self._notify(
                f"{signal.Signals(number).name}: saving after this step; once more exits at once, unsaved"
            )
