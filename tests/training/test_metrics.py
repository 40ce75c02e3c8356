"""The metrics file: what is written is read, and a crash costs at most the last line."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesys.checkpoint import FileSystem
from moesys.errors import CheckpointError, DataError, DiskSpaceError, MissingExtraError
from moesys.training.metrics import (
    EvaluationMetrics,
    EventMetrics,
    MetricsWriter,
    Record,
    TensorBoardWriter,
    TrainMetrics,
    decode_record,
    drop_after,
    encode_record,
    read_metrics,
)

TRAIN = TrainMetrics(
    step=10,
    tokens=20480,
    elapsed_s=3.5,
    loss=4.25,
    bits_per_byte=2.5,
    learning_rate=1e-3,
    gradient_norm=0.75,
    tokens_per_s=5851.4,
    gemm_share=None,
    balance_loss=1.02,
    router_z_loss=0.125,
    moe_layers=[1, 3],
    expert_tokens=[[3, 0, 5], [2, 2, 4]],
    imbalance=1.7,
    routing_entropy=0.9,
    router_confidence=0.4,
    dropped=0,
)
EVALUATION = EvaluationMetrics(
    step=20, tokens=40960, elapsed_s=8.0, heldout_loss=4.0, heldout_bits_per_byte=2.25, heldout_tokens=4096
)
EVENT = EventMetrics(
    step=30, elapsed_s=9.0, event="skipped_step", message="Gradient of “wq” was NaN\nskipped"
)


def write(path: Path, *records: Record) -> None:
    with MetricsWriter(path) as writer:
        for record in records:
            writer.write(record)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    measured = replace(TRAIN, step=11, gemm_share=0.5)
    write(path, TRAIN, EVALUATION)
    write(path, EVENT, measured)
    metrics = read_metrics(path)
    assert metrics.train == [TRAIN, measured]
    assert metrics.evaluations == [EVALUATION]
    assert metrics.events == [EVENT]
    kinds = [json.loads(line)["kind"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert kinds == ["train", "evaluate", "event", "train"]


def test_each_line_is_on_disk_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(TRAIN)
    assert read_metrics(tmp_path / "metrics.jsonl").train == [TRAIN]
    writer.close()


def test_floats_that_are_not_finite_survive_as_strict_json() -> None:
    line = encode_record(replace(TRAIN, loss=math.nan, gradient_norm=math.inf, gemm_share=-math.inf))

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not strict JSON")

    assert json.loads(line, parse_constant=refuse)["loss"] == "NaN"
    record = decode_record(line)
    assert isinstance(record, TrainMetrics)
    assert math.isnan(record.loss)
    assert record.gradient_norm == math.inf
    assert record.gemm_share == -math.inf


def test_every_torn_last_line_is_left_out_and_mended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, TRAIN)
    whole = path.read_bytes()
    torn = encode_record(EVENT).encode("utf-8")
    for length in range(1, len(torn)):
        path.write_bytes(whole + torn[:length])
        metrics = read_metrics(path)
        assert metrics.train == [TRAIN]
        assert metrics.events == []
        write(path, EVALUATION)
        assert path.read_bytes() == whole + encode_record(EVALUATION).encode("utf-8") + b"\n"


def test_a_last_line_that_lacks_only_its_line_break_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(encode_record(TRAIN), encoding="utf-8")
    write(path, EVALUATION)
    metrics = read_metrics(path)
    assert metrics.train == [TRAIN]
    assert metrics.evaluations == [EVALUATION]


def test_a_file_of_nothing_but_a_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "tr\x00\xff')
    write(path)
    assert path.read_bytes() == b""


def test_a_line_from_before_a_field_existed_has_its_default() -> None:
    line = encode_record(TRAIN)
    assert ', "skipped_steps": 0' in line
    assert decode_record(line.replace(', "skipped_steps": 0', "")) == TRAIN


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "Expecting value"),
        ("[1]", "JSON object"),
        ('{"kind": "picture"}', "'picture'.*train, evaluate, event"),
        ('{"kind": ["train"]}', "train, evaluate, event"),
        ('{"kind": "event", "step": 1, "elapsed_s": 0.0, "event": "a"}', r"missing fields \['message'\]"),
        (encode_record(TRAIN).replace('"dropped": 0, ', ""), r"missing fields \['dropped'\]"),
        (encode_record(EVENT)[:-1] + ', "more": 1}', r"unknown fields \['more'\]"),
        (encode_record(EVENT).replace("30", "true", 1), "step must be an integer, not True"),
        (encode_record(EVENT).replace("9.0", '"nine"'), "elapsed_s must be a number, not 'nine'"),
        (encode_record(EVENT).replace("9.0", "NaN"), "NaN is not JSON"),
        (encode_record(TRAIN).replace("[2, 2, 4]", "[2, 2, null]"), "expert_tokens must be an integer"),
    ],
)
def test_an_unreadable_line_names_file_and_line_and_is_forgiven_only_at_the_end(
    tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    before = encode_record(TRAIN) + "\n"
    path.write_text(f"{before}{line}\n", encoding="utf-8")
    assert read_metrics(path).train == [TRAIN]
    path.write_text(f"{before}{line}\n{encode_record(EVALUATION)}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"metrics\.jsonl:2 is not a line of metrics: .*{reason}"):
        read_metrics(path)


def test_drop_after_keeps_the_lines_up_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, TRAIN, EVALUATION, EVENT, replace(TRAIN, step=20), replace(TRAIN, step=21))
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(b'{"kind": "tra')
    assert drop_after(path, step=20) == 2
    assert path.read_bytes() == lines[0] + lines[1] + lines[3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_drop_after_leaves_a_damaged_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"damage\n{encode_record(TRAIN)}\n", encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        drop_after(path, step=0)
    assert path.read_bytes() == before


def test_drop_after_of_no_file_drops_nothing(tmp_path: Path) -> None:
    assert drop_after(tmp_path / "metrics.jsonl", step=0) == 0
    assert list(tmp_path.iterdir()) == []


class FullDisk(FileSystem):
    """Takes nothing."""

    def system_call(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        if call is not shutil.disk_usage:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().system_call(call, *args, **kwargs)


def test_a_full_disk_names_the_file_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, TRAIN)
    with (
        MetricsWriter(path, FullDisk()) as writer,
        pytest.raises(DiskSpaceError, match=r"metrics\.jsonl") as caught,
    ):
        writer.write(EVALUATION)
    assert f"{len(encode_record(EVALUATION)) + 1} bytes" in str(caught.value)
    assert path.read_text() == encode_record(TRAIN) + "\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot open .*run/metrics\.jsonl: "):
        MetricsWriter(tmp_path / "run" / "metrics.jsonl")


def test_tensorboard_gets_each_figure(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path)
    for record in (TRAIN, EVALUATION, EVENT):
        writer.write(record)
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/loss", "train/dropped", "evaluate/heldout_bits_per_byte"} <= set(scalars)
    assert "train/gemm_share" not in scalars
    [loss] = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (10, 4.25)


def test_tensorboard_that_is_not_installed_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"'tensorboard'.*moesys\[train\]"):
        TensorBoardWriter(tmp_path)
