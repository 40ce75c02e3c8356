"""What is said of a run within a budget: every figure from counts known beforehand, text by text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from moesys.inference import BatchStats, GenerationStats, RunMeter
from moesys.inference.continuation import FinishReason
from moesys.inference.offload import OffloadedModel
from moesys.moe import DemandTally, PlainLayout
from moesys.store import Extent, LeastRecent, Section, SectionCache, SectionReader, SlotPool, StoredFile

LAYOUT = PlainLayout(hidden_size=4, inner_size=3, dtype=torch.float32)
SECTION_BYTES = sum(shape.num_bytes for shape in LAYOUT.part_shapes)
DISK_RATE = 1000.0
NUM_EXPERTS = 5
STATS = GenerationStats(4, 3, prefill_s=2.0, decode_s=0.5, finish_reason=FinishReason.LENGTH)


class _Served:
    """An expert source over a cache of two slots, without computing, and what a meter reads of it."""

    def __init__(self, cache: SectionCache[SlotPool], disk_rate: float | None) -> None:
        self._cache = cache
        self.tally = DemandTally(self)
        profile = SimpleNamespace(find_best_read=lambda size: SimpleNamespace(bytes_per_s=disk_rate))
        self.caches = {LAYOUT: cache}
        self.experts = SimpleNamespace(layouts={0: LAYOUT})
        speed = SimpleNamespace(profile=profile)
        self.plan = SimpleNamespace(
            footprint=SimpleNamespace(slot_bytes=SECTION_BYTES),
            predicted=None if disk_rate is None else SimpleNamespace(speed=speed),
        )

    @property
    def stats(self) -> Any:
        return replace(self._cache.stats)

    def hint(self, layer_id: int, routing: object) -> None: ...

    def acquire(self, layer_id: int, demand: torch.Tensor) -> Iterator[Any]:
        self._cache.begin_turn()
        for expert in (demand.diff() > 0).nonzero().flatten().tolist():
            key = (layer_id, expert)
            self._cache.demand(key)
            if not self._cache.is_here(key):
                assert self._cache.start(key)
            while not self._cache.is_ready(key):
                self._cache.wait_any([key])
            self._cache.use(key)
        return iter(())

    def release(self, layer_id: int, view: object) -> None: ...

    def need(self, *experts: int) -> None:
        counts = [int(expert in experts) for expert in range(NUM_EXPERTS)]
        list(self.tally.acquire(0, torch.tensor([0, *counts]).cumsum(0)))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[SectionCache[SlotPool]]:
    path = tmp_path / "experts.bin"
    path.write_bytes(bytes(NUM_EXPERTS * SECTION_BYTES))
    descriptor = os.open(path, os.O_RDONLY)
    file = StoredFile.identify(path, descriptor)
    os.close(descriptor)
    first, second = (shape.num_bytes for shape in LAYOUT.part_shapes)
    sections = {
        (0, i): Section(
            f"expert {i}",
            (Extent(file, i * SECTION_BYTES, first, 0), Extent(file, i * SECTION_BYTES + first, second, 1)),
        )
        for i in range(NUM_EXPERTS)
    }
    with SectionReader(1) as reader:
        yield SectionCache(SlotPool(2, LAYOUT.part_shapes), sections, reader, LeastRecent())


def make_meter(served: _Served) -> RunMeter:
    return RunMeter(cast("OffloadedModel", served))


def test_figures_of_a_text_are_those_of_its_own_steps(cache: SectionCache[SlotPool]) -> None:
    served = _Served(cache, None)
    for text in range(2):
        meter = make_meter(served)
        served.need(0)
        served.need(1)
        served.need(2)
        meter.note_first_token()
        # 1 and 2 are there. LRU loads 0, in place of 1, and 1 again; the best choice drops 2 and loads 0 alone.
        for expert in (1, 2, 0, 1, 0):
            served.need(expert)
        report = meter.report_text(STATS)
        assert report.prompt is not None
        assert report.writing is not None
        assert (report.prompt.num_loads, report.prompt.hit_rate) == ((3, 0.0) if text == 0 else (1, 2 / 3))
        assert report.prompt.policy_share is None
        assert report.writing.num_loads == 2
        assert report.writing.hit_rate == 3 / 5
        assert report.writing.policy_share == 1 / 2
        assert report.writing.disk_bytes_per_token == 2 * SECTION_BYTES / 2
        assert report.writing.memory_bytes_per_token == 5 * SECTION_BYTES / 2
        assert report.writing.transfer_share is None
        assert not report.predictions


def test_guesses_are_those_that_were_read(cache: SectionCache[SlotPool]) -> None:
    served = _Served(cache, None)
    meter = make_meter(served)
    served.need(0)
    meter.note_first_token()
    assert cache.prefetch((0, 1))
    assert not cache.prefetch((0, 2)), "both slots hold what may still be needed"
    served.need(1)
    writing = meter.report_text(STATS).writing
    assert writing is not None
    assert (writing.num_guessed, writing.num_right, writing.precision) == (1, 1, 1.0)
    assert writing.wasted_bytes == 0


def test_the_transfer_share_is_of_bytes_that_were_used(
    cache: SectionCache[SlotPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesys.inference.run_report._predict_prompt", lambda plan, stats, num_held: None)
    monkeypatch.setattr("moesys.inference.run_report._compare", lambda kind, predicted, traffic: kind)
    served = _Served(cache, DISK_RATE)
    served.plan.predicted.speed.predict_decode = lambda *arguments: None
    served.plan.predicted.num_slots = 2
    meter = make_meter(served)
    served.need(0)
    meter.note_first_token()
    served.need(1)
    served.need(2)
    report = meter.report_text(STATS)
    assert report.writing is not None
    assert report.writing.transfer_share == 2 * SECTION_BYTES / DISK_RATE / 0.5
    assert report.predictions == ("prompt", "writing")


def test_the_forecast_of_a_prompt_knows_what_is_in_memory(
    cache: SectionCache[SlotPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    monkeypatch.setattr(
        "moesys.inference.run_report._predict_prompt", lambda plan, stats, num_held: held.append(num_held)
    )
    monkeypatch.setattr("moesys.inference.run_report._compare", lambda kind, predicted, traffic: kind)
    served = _Served(cache, DISK_RATE)
    served.plan.predicted.speed.predict_decode = lambda *arguments: None
    served.plan.predicted.num_slots = 2
    for _ in range(2):
        meter = make_meter(served)
        served.need(0)
        meter.note_first_token()
        served.need(1)
        meter.report_text(STATS)
    assert held == [0, 2]


def test_a_report_is_lines_for_people_and_json_for_programs(cache: SectionCache[SlotPool]) -> None:
    served = _Served(cache, None)
    meter = make_meter(served)
    with pytest.raises(ValueError, match="no first token"):
        meter.report_text(STATS)
    served.need(0)
    meter.note_first_token()
    served.need(0)
    report = meter.report_text(STATS)
    lines = list(report.describe())
    assert lines[0].startswith("prompt: 0% of expert uses found in memory")
    assert lines[1].startswith("writing: 100% of expert uses found in memory, 0.0 MiB read")
    assert json.loads(json.dumps(report.encode()))["writing"]["hit_rate"] == 1.0


def test_a_batch_is_counted_as_a_whole(cache: SectionCache[SlotPool]) -> None:
    served = _Served(cache, None)
    meter = make_meter(served)
    for expert in (0, 1, 0, 2):
        served.need(expert)
    report = meter.report_batch(BatchStats(num_steps=4, prompt_tokens=8, new_tokens=6, seconds=2.0), 2)
    assert report.prompt is None
    assert report.writing is not None
    assert report.writing.num_loads == 3
    assert report.writing.policy_share == 1.0
    assert report.writing.disk_bytes_per_token == 3 * SECTION_BYTES / 6
