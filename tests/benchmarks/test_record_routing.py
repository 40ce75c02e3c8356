"""The recording script, on a model and a text of no size: it trains, records held-out tokens, and exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import record_routing
from moesys.checkpoint import load_model
from moesys.config import load_config
from moesys.data import PackedTokens, prepare_data
from moesys.models import DocumentAttend
from moesys.moe.routing_log import RoutingLog

TINY = [
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_experts=8",
    "model.top_k=2",
    "model.expert_intermediate_size=8",
    "data.vocab_size=300",
    "data.sequence_length=16",
    "data.heldout_fraction=0.3",
    "training.batch_sequences=2",
    "training.warmup_steps=1",
    "runtime.kernel=torch",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(8):
        lines = [f"line {i} of file {number}: {i * number % 17} apples\n" for i in range(12)]
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GEMM rate is measured, no kernel built, and the allocator stays as it is."""
    monkeypatch.setenv("MOESYS_KERNEL", "torch")
    monkeypatch.setattr("moesys.training.log.measure_gemm_rate", lambda dtype, device: 1e12)
    monkeypatch.setattr("moesys.training.trainer.keep_freed_memory", lambda: False)


def make_packed(lengths: list[int]) -> PackedTokens:
    starts = np.cumsum([0, *lengths])
    return PackedTokens(
        np.arange(starts[-1] + 1, dtype=np.uint16), starts, np.array(lengths), tuple("abc"), end_of_text_id=0
    )


def test_a_log_holds_what_the_exported_model_routes(corpus: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "results" / "log.safetensors", tmp_path / "model"
    arguments = ["--minutes", "0.0001", "--threads", "1", "--tokens", "50", "--log", path, "--model", model]
    status = record_routing.main([*map(str, arguments), f'data.source="{corpus}"', *TINY])
    assert status == 0
    log = RoutingLog.read(path)
    assert (log.num_tokens, log.num_steps, dict(log.num_experts)) == (50, 50, {0: 8, 1: 8})
    assert log.expert_ids[0].shape == (50, 2)
    assert "held-out bits per byte" in log.origin

    decoder = load_model(model).eval()
    packed = prepare_data(
        load_config(None, [f'data.source="{corpus}"', *TINY]).data, tmp_path / "cache"
    ).heldout
    first = next(record_routing.cut_documents(packed, 50, 16))
    with torch.no_grad():
        output = decoder(first[None], torch.arange(len(first))[None], DocumentAttend(None))
    for layer, routing in output.routings.items():
        assert torch.equal(log.expert_ids[layer][: len(first)].long(), routing.expert_ids.view(-1, 2))


def test_documents_are_cut_into_windows_of_their_own() -> None:
    windows = list(record_routing.cut_documents(make_packed([5, 3, 9]), 15, 4))
    assert [window.tolist() for window in windows] == [
        [0, 1, 2, 3], [4], [5, 6, 7], [8, 9, 10, 11], [12, 13, 14]
    ]  # fmt: skip
    assert sum(map(len, record_routing.cut_documents(make_packed([5, 3, 9]), 100, 4))) == 17


def test_time_and_tokens_are_more_than_none(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--minutes", "0"), ("--tokens", "0")):
        with pytest.raises(SystemExit):
            record_routing.main(["--log", "x", option, value])
        assert "must be more than 0" in capsys.readouterr().err
