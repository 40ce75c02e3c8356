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


class Interrupted(Exception):  # noqa: N818  a request that was met, not an error
    """Leaves work that need not be finished, such as an evaluation; caught by the loop, which saves."""


class Interruption:
    """While entered, SIGINT and SIGTERM set ``signal_number``; a second one ends the process at once.

    Outside the main thread, where Python allows no handlers, it never fires.
    """

    def __init__(self, notify: Callable[[str], None], restore_terminal: Callable[[], None]) -> None:
        """``restore_terminal`` is called from within the second signal's handler, just before the process ends."""
        self._notify = notify
        self._restore_terminal = restore_terminal
        self._previous: dict[int, object] = {}
        self.signal_number: int | None = None
        """The first signal; None while there was none."""

    @property
    def is_requested(self) -> bool:
        return self.signal_number is not None

    def raise_if_requested(self) -> None:
        """Raises `Interrupted` once a signal has come."""
        if self.is_requested:
            raise Interrupted

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
            self._restore_terminal()
            os._exit(exit_status(number))
        self.signal_number = number
        # A stream refuses a write that interrupts its own write; the request counts all the same.
        with suppress(RuntimeError):
            self._notify(
                f"{signal.Signals(number).name}: saving after this step; once more exits at once, unsaved"
            )


def exit_status(signal_number: int) -> int:
    """Returns the status of a process that a signal ended, as shells report it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + signal_number
