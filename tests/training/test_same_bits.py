"""Same seed, same bits: two fresh processes that train the same config write the same checkpoint, per backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SETTINGS

from moesys.checkpoint import RunState, load_newest_checkpoint
from moesys.kernels.products import prefers_native

STEPS = 3


def train(corpus: Path, folder: Path, kernel: str) -> RunState:
    """Trains in a process of its own and returns what it saved at its end."""
    settings = [*SETTINGS, f"training.steps={STEPS}", f'data.source="{corpus}"', "runtime.threads=2"]
    environment = {**os.environ, "MOESYS_KERNEL": kernel, "PYTHONHASHSEED": "random"}
    command = [sys.executable, "-m", "moesys", "train", *settings, "--run", str(folder / "run")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return load_newest_checkpoint(folder / "run" / "checkpoints", on_damage=pytest.fail)


def differing(first: RunState, second: RunState) -> list[str]:
    assert first.tensors.keys() == second.tensors.keys()
    return [name for name, tensor in first.tensors.items() if not torch.equal(tensor, second.tensors[name])]


def read_losses(folder: Path) -> list[Any]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["expert_tokens"]) for line in lines if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "products"), [("torch", "torch"), ("auto", "native")], ids=["torch", "native"]
)
def test_two_processes_write_the_same_bits(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, products: str
) -> None:
    monkeypatch.delenv("MOESYS_KERNEL", raising=False)
    if products == "native" and not prefers_native(torch.empty(0)):
        pytest.skip("this CPU's products are torch's: there is no other backend to train with")
    first, second = (train(corpus, tmp_path / name, kernel) for name in ("a", "b"))
    assert first.step == second.step == STEPS
    assert first.metadata["products"] == products
    assert differing(first, second) == []
    assert read_losses(tmp_path / "a") == read_losses(tmp_path / "b")
