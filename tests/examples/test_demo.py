"""The demo's own decisions; `make demo` itself runs in CI."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from moesys.config import TrainingConfig

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("decay", [0.0, 0.2, 0.6, 0.97])
@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_the_shortest_demo_has_a_valid_config(schedule: str, decay: float, warmup: int) -> None:
    count_fewest_steps = runpy.run_path(str(DEMO))["count_fewest_steps"]
    settings = {"schedule": schedule, "decay_fraction": decay, "warmup_steps": warmup}
    steps = count_fewest_steps(TrainingConfig.model_validate({**settings, "steps": 100_000}))
    TrainingConfig.model_validate({**settings, "steps": steps})


def test_steps_that_the_demo_would_overwrite_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO), "--run", str(tmp_path / "run"), "model.top_k=1", "training.steps=5"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "training.steps has no effect here: the demo takes the steps that fit --minutes" in done.stderr
    assert not (tmp_path / "run").exists()
