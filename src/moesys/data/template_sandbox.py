"""The process that renders chat templates, seen from outside: a question, an answer, and an end to patience.

Knows nothing of conversations. The process starts before it is needed, serves any number of renderings, and is replaced
after one that broke it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesys.errors import ModelFormatError

_READ_BYTES = 1 << 20
_WORKER = Path(__file__).with_name("template_worker.py")


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may take."""

    cpu_s: int = 2
    """Processor time, up to one second more; where the system has such a limit."""
    wall_s: int = 30
    """Time by the clock."""
    memory_bytes: int = 512 * 2**20
    """Address space of the process; where the system has such a limit."""
    max_chars: int = 8 * 2**20
    """Length of the text."""


@dataclass(frozen=True)
class Rendered:
    """What a template wrote."""

    text: str
    spans: tuple[tuple[int, int], ...] | None
    """(start, end) in characters of each ``{% generation %}`` block; None where macros hide their places."""


class TemplateSandbox:
    """A process of its own for templates that nobody vouches for. May be used from several threads."""

    def __init__(self, limits: TemplateLimits = TemplateLimits()) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._process = self._start()

    def render(self, template: str, variables: Mapping[str, Any], now: str | None = None) -> Rendered:
        """Renders a template. variables: JSON values. now: an ISO date or time for ``strftime_now``; None: the clock's.

        Raises `ModelFormatError` with the cause alone: who calls names the template.
        """
        request = json.dumps({"template": template, "variables": variables, "now": now})
        with self._lock:
            answer = self._ask(request.encode() + b"\n")
        if "error" in answer:
            raise ModelFormatError(answer["error"])
        spans = answer["spans"]
        return Rendered(
            answer["text"], None if spans is None else tuple((start, end) for start, end in spans)
        )

    def _ask(self, request: bytes) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            answer = self._read_line(process)
        except BrokenPipeError:
            answer = b""
        except BaseException:
            self._replace()  # or the next request would get this one's answer
            raise
        if answer.endswith(b"\n"):
            return json.loads(answer)
        self._replace()
        return {"error": f"it was stopped: it took more than {self._limits.cpu_s} seconds, recursed too deeply or "
                         "broke its process"}  # fmt: skip

    def _read_line(self, process: subprocess.Popen[bytes]) -> bytes:
        """Returns what came until the line was complete, the process ended or patience did."""
        assert process.stdout is not None
        source = process.stdout.fileno()
        readable = select.poll()
        readable.register(source, select.POLLIN)
        deadline = time.monotonic() + self._limits.wall_s
        pieces = [b""]
        while not pieces[-1].endswith(b"\n"):
            if not readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                break
            pieces.append(os.read(source, _READ_BYTES))
            if not pieces[-1]:
                break
        return b"".join(pieces)

    def _replace(self) -> None:
        self._stop()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        limits = {name: getattr(self._limits, name) for name in ("cpu_s", "memory_bytes", "max_chars")}
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), json.dumps(limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the command, not for its helper
        )
        self._stop = weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:  # what was still to be written has no reader any more
            continue
