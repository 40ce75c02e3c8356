"""What the person watching sees, in a terminal and in a log."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest

from moesys.training.console import (
    LiveConsole,
    PlainConsole,
    Progress,
    compute_progress,
    format_progress,
    open_console,
)
from moesys.training.metrics import TrainMetrics

METRICS = TrainMetrics(
    step=250,
    tokens=500_000,
    elapsed_s=50.0,
    loss=3.21456,
    bits_per_byte=1.7349,
    learning_rate=1e-3,
    gradient_norm=0.75,
    tokens_per_s=12_300.0,
    gemm_share=0.447,
    balance_loss=1.02,
    router_z_loss=0.125,
    moe_layers=[0],
    expert_tokens=[[3, 5]],
    imbalance=1.318,
    routing_entropy=0.9,
    router_confidence=0.4,
    dropped=0,
)
LINE = (
    "step  250/1000 | loss 3.2146 | 1.735 bits/byte | 12.3K tokens/s | 45% of GEMM rate | imbalance 1.32"
    " | 2:02 left"
)


def test_drops_are_shown_where_there_are_any() -> None:
    dropping = compute_progress(replace(METRICS, expert_tokens=[[30, 50], [60, 60]], dropped=7), 1000)
    assert "| imbalance 1.32 | 3.5% dropped |" in format_progress(dropping)
    assert "dropped" not in format_progress(compute_progress(METRICS, 1000))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_progress_has_every_figure() -> None:
    assert format_progress(compute_progress(METRICS, total_steps=1000)) == LINE


def test_figures_that_are_not_known_are_left_out() -> None:
    assert format_progress(Progress(step=3, total_steps=10)) == "step  3/10"
    dense = compute_progress(replace(METRICS, imbalance=math.nan, gemm_share=None, tokens_per_s=0.0), 1000)
    assert format_progress(dense) == "step  250/1000 | loss 3.2146 | 1.735 bits/byte | 0 tokens/s"


def test_a_loss_that_is_nan_is_shown() -> None:
    assert "loss nan" in format_progress(compute_progress(replace(METRICS, loss=math.nan), 1000))


def test_no_time_is_left_after_the_last_step() -> None:
    assert compute_progress(METRICS, total_steps=250).remaining_s == 0


def test_plain_console_prints_one_line_per_record_and_none_per_step() -> None:
    stream = io.StringIO()
    with open_console(1000, stream) as console:
        assert isinstance(console, PlainConsole)
        for step in range(200, 251):
            console.advance(step)
        console.show(METRICS)
        console.message("saved [bold]step-250[/bold]")
        console.warning("step 251 skipped")
    assert stream.getvalue().splitlines() == [
        LINE,
        "saved [bold]step-250[/bold]",
        "WARNING: step 251 skipped",
    ]


def test_live_console_keeps_one_line_and_prints_messages_as_they_are(terminal: Terminal) -> None:
    with open_console(1000, terminal) as console:
        assert isinstance(console, LiveConsole)
        console.show(METRICS)
        console.advance(251)
        console.message("saved [bold]step-250[/bold]")
        console.warning("step 251 skipped")
    shown = terminal.getvalue()
    assert LINE.replace("250/1000", "251/1000") in shown
    assert "saved [bold]step-250[/bold]" in shown
    loud = shown.index("WARNING: step 251 skipped")
    assert shown[:loud].endswith("\x1b[1;33m")
    assert "\x1b[2K" in shown, "the live line must be erased before it is drawn again"
    assert shown.endswith("\x1b[?25h"), "the cursor must be given back"


def test_live_console_gives_the_terminal_back_on_an_error(terminal: Terminal) -> None:
    with pytest.raises(RuntimeError, match="stop"), open_console(1000, terminal):
        raise RuntimeError("stop")
    assert terminal.getvalue().endswith("\x1b[?25h")


def test_a_terminal_without_cursor_movement_gets_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_console(1000, terminal), PlainConsole)
