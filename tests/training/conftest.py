"""Lines of a metrics file for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moesys.training.metrics import TrainMetrics

MakeLine = Callable[[int, list[int], list[list[int]]], TrainMetrics]


@pytest.fixture(scope="session")
def make_line() -> MakeLine:
    """Makes the line of a step with the given MoE layers and, per layer, the tokens of each expert."""

    def make(step: int, moe_layers: list[int], expert_tokens: list[list[int]]) -> TrainMetrics:
        return TrainMetrics(
            step=step,
            tokens=step * 8,
            elapsed_s=float(step),
            loss=5.0 / step,
            bits_per_byte=4.0 / step,
            learning_rate=1e-3,
            gradient_norm=1.0,
            tokens_per_s=1000.0 + step,
            gemm_share=0.4,
            balance_loss=1.0,
            router_z_loss=0.1,
            moe_layers=moe_layers,
            expert_tokens=expert_tokens,
            imbalance=1.5,
            routing_entropy=0.9,
            router_confidence=0.4,
            dropped=0,
        )

    return make


@pytest.fixture(scope="session")
def train_lines(make_line: MakeLine) -> list[TrainMetrics]:
    """Four lines up to step 35: layer 1 is uneven, layer 3 even, and layer 5 starves an expert."""
    return [make_line(step, [1, 3, 5], [[3, 1], [2, 2], [4, 0]]) for step in (10, 20, 30, 35)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        lines = [f"line {i} of file {number}: {i * number % 17} apples and {i % 5} pears\n" for i in range(7)]
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GEMM rate is measured, which takes longer than a tiny run, and the allocator stays as it is: other tests
    of this process measure memory."""
    monkeypatch.setattr("moesys.training.log.measure_gemm_rate", lambda dtype, device: 1e12)
    monkeypatch.setattr("moesys.training.trainer.keep_freed_memory", lambda: False)
