"""Resuming needs the state of the run and little more: 1.02 x weights and moments + 128 MiB above an idle process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peak_memory import MEASURE_PEAK

SCRIPT = (
    MEASURE_PEAK
    + """
import io, sys
import torch
from moesys.config import load_config
from moesys.training import PlainConsole, Trainer

run, mode, overrides = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
console = PlainConsole(2, io.StringIO())
if mode == "make":
    trainer = Trainer.start(load_config(None, overrides), run, console)
    trainer.take_step()
    trainer.save()
    sys.exit()
idle = read_resident()
trainer, peak = measure_peak(lambda: Trainer.resume(run, console))
assert trainer.step == 1
state = sum(t.numel() * t.element_size() for t in trainer.optimizer.export_state().values())
copies = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.dtype != torch.float32)
print(state + copies, peak - idle)
"""
)
SETTINGS = [
    "model.hidden_size=512", "model.num_layers=1", "model.num_experts=24", "model.expert_intermediate_size=1024",
    "data.vocab_size=300", "data.sequence_length=16", "data.heldout_fraction=0.2",
    "training.steps=2", "training.batch_sequences=2", "training.warmup_steps=1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peak_memory_of_resuming(corpus: Path, tmp_path: Path, dtype: str) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    run("make", *SETTINGS, f'data.source="{corpus}"', f"training.dtype={dtype}")
    state, peak = (int(word) for word in run("resume").split())
    # So large that a third of it once more, such as loaded weights beside the model's own, would not fit.
    assert state > 400 * 2**20
    assert peak <= 1.02 * state + 128 * 2**20
