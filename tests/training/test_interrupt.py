"""Ctrl-C: the first one saves, the second one leaves at once."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_runs import SETTINGS

from moesys.checkpoint import load_newest_checkpoint
from moesys.training import interrupt
from moesys.training.interrupt import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_a_request_and_the_handlers_come_back(number: signal.Signals) -> None:
    before, told = signal.getsignal(number), []
    with Interruption(told.append) as interruption:
        assert not interruption.is_requested
        os.kill(os.getpid(), number)
        assert interruption.is_requested
    assert signal.getsignal(number) is before
    assert told == [f"{number.name}: saving after this step; once more exits at once, unsaved"]


def test_a_console_that_is_just_writing_does_not_lose_the_request() -> None:
    def refuse(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with Interruption(refuse) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.is_requested


def test_the_second_signal_exits_at_once() -> None:
    script = (
        "import os, runpy, signal, sys\n"
        "Interruption = runpy.run_path(sys.argv[1])['Interruption']\n"
        "with Interruption(lambda text: None):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('never printed', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, interrupt.__file__], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "still here\n", "")


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with Interruption(print) as interruption:
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
