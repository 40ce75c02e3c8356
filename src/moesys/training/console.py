"""What a person watching the run sees: one live line on a terminal, plain lines everywhere else.

Knows how a line looks and where it goes; does not know the loop, the files or the clock. The idea: both
consoles show the text of one pure function, so a log and a terminal say the same.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from moesys.training.metrics import TrainMetrics
from moesys.units import format_count, format_duration

_SHOW_CURSOR = b"\x1b[?25h\n"


@dataclass(frozen=True)
class Progress:
    """The figures of one progress line; a figure that is None is left out."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    """Optimizer steps of the whole run."""
    loss: float | None = None
    """Cross-entropy in nats per token."""
    bits_per_byte: float | None = None
    """The same in bits per byte of text."""
    tokens_per_s: float | None = None
    """Tokens trained per second."""
    gemm_share: float | None = None
    """Arithmetic rate as a share (0 to 1) of the measured GEMM rate."""
    imbalance: float | None = None
    """Tokens of the busiest expert divided by the mean, averaged over MoE layers."""
    dropped_share: float | None = None
    """Assignments that were dropped, as a share (0 to 1) of all; None where none was."""
    skipped_steps: int | None = None
    """Steps that were not applied; None where all were."""
    remaining_s: float | None = None
    """Estimated seconds until the last step."""


def compute_progress(metrics: TrainMetrics, total_steps: int) -> Progress:
    """Returns the line for one record of training.

    The remaining time is the remaining steps at the mean tokens per step and the record's tokens per second,
    so it follows the present speed and holds after a resume; evaluations and checkpoints are not in it.
    """
    remaining_s = None
    if metrics.tokens_per_s > 0 and metrics.tokens > 0:
        tokens_left = (total_steps - metrics.step) * metrics.tokens / metrics.step
        remaining_s = tokens_left / metrics.tokens_per_s
    return Progress(
        step=metrics.step,
        total_steps=total_steps,
        loss=metrics.loss,
        bits_per_byte=metrics.bits_per_byte,
        tokens_per_s=metrics.tokens_per_s,
        gemm_share=metrics.gemm_share,
        imbalance=metrics.imbalance if math.isfinite(metrics.imbalance) else None,
        dropped_share=metrics.dropped / sum(map(sum, metrics.expert_tokens)) if metrics.dropped else None,
        skipped_steps=metrics.skipped_steps or None,
        remaining_s=remaining_s,
    )


def format_progress(progress: Progress) -> str:
    """Returns the line, for example ``step  120/1000 | loss 3.2140 | 1.734 bits/byte | ... | 3:21 left``."""
    width = len(str(progress.total_steps))
    parts = [f"step {progress.step:>{width}}/{progress.total_steps}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.bits_per_byte is not None:
        parts.append(f"{progress.bits_per_byte:.3f} bits/byte")
    if progress.tokens_per_s is not None:
        parts.append(f"{format_count(progress.tokens_per_s)} tokens/s")
    if progress.gemm_share is not None:
        parts.append(f"{progress.gemm_share:.0%} of GEMM rate")
    if progress.imbalance is not None:
        parts.append(f"imbalance {progress.imbalance:.2f}")
    if progress.dropped_share is not None:
        parts.append(f"{progress.dropped_share:.1%} dropped")
    if progress.skipped_steps is not None:
        parts.append(f"{progress.skipped_steps} skipped")
    if progress.remaining_s is not None:
        parts.append(f"{format_duration(progress.remaining_s)} left")
    return " | ".join(parts)


class Console(Protocol):
    """What the loop tells the person watching."""

    def advance(self, step: int) -> None:
        """A step was done; moves the live line and prints nothing."""

    def show(self, metrics: TrainMetrics) -> None:
        """Shows the figures of one log interval."""

    def message(self, text: str) -> None:
        """Prints a line that stays."""

    def warning(self, text: str) -> None:
        """Prints a line that stays and that cannot be overlooked."""

    def close(self) -> None:
        """Leaves the last line standing and gives the terminal back."""

    def abandon(self) -> None:
        """Gives the terminal back from within a signal handler, when the process is about to end."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PlainConsole:
    """Writes one plain line per log interval: for files, pipes and CI."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        self._total_steps = total_steps
        self._stream = stream

    def advance(self, step: int) -> None:
        pass

    def show(self, metrics: TrainMetrics) -> None:
        self.message(format_progress(compute_progress(metrics, self._total_steps)))

    def message(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def warning(self, text: str) -> None:
        self.message(f"WARNING: {text}")

    def close(self) -> None:
        self._stream.flush()

    def abandon(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LiveConsole:
    """Keeps one line up to date at the bottom of a terminal; messages and warnings scroll above it."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        self._progress = Progress(step=0, total_steps=total_steps)
        self._stream = stream
        self._terminal = RichConsole(file=stream, highlight=False)
        self._live = Live(Text("starting"), console=self._terminal, refresh_per_second=8)
        self._live.start()

    def advance(self, step: int) -> None:
        self._update(replace(self._progress, step=step))

    def show(self, metrics: TrainMetrics) -> None:
        self._update(compute_progress(metrics, self._progress.total_steps))

    def message(self, text: str) -> None:
        self._terminal.print(Text(text), soft_wrap=True)

    def warning(self, text: str) -> None:
        self._terminal.print(Text(f"WARNING: {text}", style="bold yellow"), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def abandon(self) -> None:
        # Past rich and the stream's buffer: the signal may have come while either was at work.
        os.write(self._stream.fileno(), _SHOW_CURSOR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _update(self, progress: Progress) -> None:
        self._progress = progress
        self._live.update(Text(format_progress(progress), style="bold cyan"))


def open_console(total_steps: int, stream: TextIO) -> Console:
    """Returns a live console where the stream is a terminal that can move its cursor, else a plain one."""
    if stream.isatty() and not RichConsole(file=stream).is_dumb_terminal:
        return LiveConsole(total_steps, stream)
    return PlainConsole(total_steps, stream)
