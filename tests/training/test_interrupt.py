"""Ctrl-C: the first one saves, the second one leaves at once."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SETTINGS, STEPS, resume, start

from moesys.checkpoint import load_newest_checkpoint
from moesys.models import Decoder, DecoderOutput
from moesys.training import interrupt
from moesys.training.interrupt import Interruption
from moesys.training.metrics import read_metrics


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_a_request_and_the_handlers_come_back(number: signal.Signals) -> None:
    before, told = signal.getsignal(number), []
    with Interruption(told.append, pytest.fail) as interruption:
        assert not interruption.is_requested
        os.kill(os.getpid(), number)
        assert interruption.is_requested
    assert signal.getsignal(number) is before
    assert told == [f"{number.name}: saving after this step; once more exits at once, unsaved"]


def test_a_console_that_is_just_writing_does_not_lose_the_request() -> None:
    def refuse(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with Interruption(refuse, pytest.fail) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.is_requested


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_gives_the_terminal_back_and_exits_at_once(
    number: signal.Signals, status: int
) -> None:
    script = (
        "import os, runpy, signal, sys\n"
        "Interruption = runpy.run_path(sys.argv[1])['Interruption']\n"
        "with Interruption(lambda text: None, lambda: os.write(1, b'restored\\n')):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    print('never printed', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, interrupt.__file__], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "still here\nrestored\n", "")


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with Interruption(print, print) as interruption:
            seen.append((signal.getsignal(signal.SIGINT), interruption.is_requested))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def hash_tensors(run: Path) -> dict[str, str]:
    state = load_newest_checkpoint(run / "checkpoints", on_damage=pytest.fail)
    return {
        name: hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in state.tensors.items()
    }


def test_ctrl_c_ends_the_final_evaluation_and_resume_makes_it_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, embed = start(corpus, tmp_path / "run"), Decoder.forward
    passes: list[int] = []

    def interrupt_the_first_evaluated_batch(model: Decoder, *inputs: Any) -> DecoderOutput:
        if trainer.step == STEPS:
            passes.append(1)
            if len(passes) == 1:
                os.kill(os.getpid(), signal.SIGINT)
        return embed(model, *inputs)

    monkeypatch.setattr(Decoder, "forward", interrupt_the_first_evaluated_batch)
    outcome = trainer.train()
    assert (outcome.step, outcome.interrupted_by, outcome.evaluation) == (STEPS, signal.SIGINT, None)
    assert passes == [1]
    assert len(trainer.make_heldout_set().batches) > 1
    monkeypatch.setattr(Decoder, "forward", embed)

    evaluated = resume(tmp_path / "run").train()
    assert evaluated.is_finished
    assert evaluated.evaluation == trainer.evaluate()
    monkeypatch.setattr(Decoder, "forward", pytest.fail)
    assert resume(tmp_path / "run").train() == evaluated
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line.step for line in metrics.evaluations] == [STEPS]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a pseudo-terminal")
def test_a_second_ctrl_c_leaves_a_visible_cursor(corpus: Path, tmp_path: Path) -> None:
    settings = [s for s in SETTINGS if not s.startswith("training.steps")]
    command = [sys.executable, "-m", "moesys", "train", *settings, f'data.source="{corpus}"']
    command += ["training.steps=100000", "--run", str(tmp_path / "run")]
    terminal, side = pty.openpty()
    process = subprocess.Popen(command, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm"})
    os.close(side)
    shown = b""
    # The first step line means that the loop runs; both signals then come before a step could save.
    while b"bits/byte" not in shown:
        shown += os.read(terminal, 4096)
    os.kill(process.pid, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    with suppress(OSError):  # Linux reports the end of a pseudo-terminal as an error
        while piece := os.read(terminal, 4096):
            shown += piece
    assert process.wait(60) in (130, 143)
    os.close(terminal)
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_ends_in_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    settings = [s for s in SETTINGS if not s.startswith(("training.steps", "training.log_every"))]
    settings += [f'data.source="{corpus}"', "training.steps=150", "training.log_every=1", "runtime.threads=1"]

    def launch(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "moesys", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    cut, straight = tmp_path / "cut", tmp_path / "straight"
    with launch("train", *settings, "--run", str(cut)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step  20/150 |"):
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "SIGINT: saving after this step; once more exits at once, unsaved" in rest
    stopped = re.search(r"saved .*step-(\d+); go on with: moesys resume ", rest)
    assert stopped is not None
    assert 20 <= int(stopped[1]) < 150
    assert "Traceback" not in rest + errors
    with launch("resume", str(cut)) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"resumed at step {int(stopped[1])}" in output
    with launch("train", *settings, "--run", str(straight)) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert hash_tensors(cut) == hash_tensors(straight)
