"""A bar for bytes that go by, on a terminal's stderr and nowhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moesys.units import format_bytes


@contextmanager
def show_bytes(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function that takes (bytes done, all bytes) and moves the bar, which vanishes at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}")
    is_silent = not sys.stderr.isatty()
    start = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=is_silent) as progress:
        task = progress.add_task(what, total=None, amount="")

        def show(done: int, total: int) -> None:
            rate = format_bytes(done / max(time.perf_counter() - start, 1e-9))
            amount = f"{format_bytes(done)} of {format_bytes(total)}, {rate}/s"
            progress.update(task, completed=done, total=total, amount=amount)

        yield show
