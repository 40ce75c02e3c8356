"""Law 5 under kill -9: a run of 200 steps that dies at random places ends in the bits of one that never died."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import SETTINGS

from moesys.checkpoint import load_newest_checkpoint
from moesys.training.metrics import read_metrics

STEPS = 200


def launch(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moesys", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_and_kill(arguments: list[str], chance: random.Random) -> bool:
    """Kills a run at a random moment after a random number of its lines; returns whether it was finished before."""
    num_lines, delay_s = chance.randrange(1, 60), chance.uniform(0, 0.03)
    with launch(*arguments) as process:
        assert process.stdout is not None
        seen: list[str] = []
        for line in process.stdout:
            seen.append(line)
            num_lines -= line.startswith("step ")
            if num_lines == 0:
                time.sleep(delay_s)
                process.kill()
        status = process.wait(60)
    assert status in (0, -9), "".join(seen)
    return status == 0


def hash_tensors(run: Path) -> dict[str, str]:
    state = load_newest_checkpoint(run / "checkpoints", on_damage=pytest.fail)
    assert state.step == STEPS
    return {
        name: hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in state.tensors.items()
    }


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_killed_at_random_places_ends_in_the_same_bits(
    corpus: Path, tmp_path: Path, dtype: str, seed: int
) -> None:
    settings = [s for s in SETTINGS if not s.startswith(("training.steps", "training.log_every"))]
    settings += [f'data.source="{corpus}"', f"training.steps={STEPS}", "training.log_every=1"]
    settings += ["training.checkpoint_every=3", "training.evaluate_every=20", f"training.dtype={dtype}"]
    settings += ["training.micro_batch_sequences=2", "runtime.threads=1"]
    cut, straight = tmp_path / "cut", tmp_path / "straight"

    chance, num_kills = random.Random(seed), 0
    is_finished = run_and_kill(["train", *settings, "--run", str(cut)], chance)
    while not is_finished:
        num_kills += 1
        is_finished = run_and_kill(["resume", str(cut)], chance)
    assert num_kills >= 3
    with launch("train", *settings, "--run", str(straight)) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output

    assert hash_tensors(cut) == hash_tensors(straight)
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (cut, straight))
    assert [line.step for line in found.train] == list(range(1, STEPS + 1))
    assert [line.loss for line in found.train] == [line.loss for line in expected.train]
    assert [line.heldout_loss for line in found.evaluations] == [
        line.heldout_loss for line in expected.evaluations
    ]
