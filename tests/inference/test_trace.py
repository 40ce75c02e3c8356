"""Traces: every span is there once, on a lane of its own time, in a file that Perfetto's format describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moesys.errors import GenerationError
from moesys.inference.timeline import draw_timeline
from moesys.inference.trace import Activity, Trace, TracedSource
from moesys.kernels import BankView, ModuleView
from moesys.moe import Execution, LocalDispatcher, MoEConfig, MoELayer, ResidentSource, Routing
from moesys.store import Extent, ReadEvent, Section, StoredFile, Urgency

FILE = StoredFile(Path("/nowhere"), 0, 0, 0, 0)
SECTIONS = {(layer, 0): Section(f"layer {layer}, expert 0", (Extent(FILE, 0, 8, 0),)) for layer in range(3)}


def read(
    start_s: float, end_s: float, urgency: Urgency = Urgency.DEMAND, layer: int = 0, failed: bool = False
) -> ReadEvent:
    return ReadEvent(f"layer {layer}, expert 0", 8, start_s, start_s, end_s, urgency, failed)


def read_spans(path: Path) -> list[dict]:
    return [event for event in json.loads(path.read_text()) if event["ph"] == "X"]


class _SlowViews:
    """A source that hands out a layer's experts in two views, the second after a wait."""

    def __init__(self, inner: ResidentSource) -> None:
        self._inner = inner
        self.num_released = 0
        self.stall_s = 0.0

    def hint(self, layer_id: int, routing: Routing) -> None:
        self._inner.hint(layer_id, routing)

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView | ModuleView]:
        (view,) = self._inner.acquire(layer_id, demand)
        assert isinstance(view, BankView)
        for first in (0, 2):
            self.stall_s += 1e-5 if first else 0.0
            table = torch.full((4,), -1)
            table[first : first + 2] = torch.arange(first, first + 2)
            yield BankView(view.gate_up_SFD, view.down_SDF, table)

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        self.num_released += 1


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoELayer(8, MoEConfig(4, 4, 6), layer_id=i) for i in range(3))

    def forward(self, x: Tensor, execution: Execution) -> Tensor:
        for layer in self.layers:
            x = layer(x, execution)[0]
        return x


def test_a_traced_source_changes_nothing_and_tells_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stack, x = _Stack().requires_grad_(False), torch.randn(5, 8)
    banks = {i: layer.experts for i, layer in enumerate(stack.layers)}
    source = _SlowViews(ResidentSource(banks))
    with Trace(tmp_path / "trace.json") as trace:
        traced = TracedSource(source, trace, lambda: source.stall_s)
        plain = Execution(LocalDispatcher(), _SlowViews(ResidentSource(banks)))
        with traced.watching(stack):
            for tokens in (x, x[:1], x[1:2], x[2:3], x[3:4]):
                found = stack(tokens, Execution(LocalDispatcher(), traced))
                assert torch.equal(found, stack(tokens, plain))
    assert source.num_released == 5 * 3 * 2
    spans = read_spans(tmp_path / "trace.json")
    experts = [(span["args"]["step"], span["args"]["layer"]) for span in spans if span["cat"] == "experts"]
    # The plain runs are steps of the same model, in which the traced source has no part.
    assert experts == [(2 * step, layer) for step in range(5) for layer in range(3) for _ in range(2)]
    waits = [span for span in spans if span["cat"] == "waiting for the disk"]
    assert len(waits) == 5 * 3
    assert sum(span["dur"] for span in waits) == pytest.approx(15 * 10)
    ordered = sorted((span["ts"], span["ts"] + span["dur"]) for span in spans)
    assert all(end <= start + 1e-3 for (_, end), (start, _) in pairwise(ordered))
    assert [(step.number, step.num_tokens) for step in trace.steps] == [(0, 5), (7, 0), (8, 1), (9, 0)]


def test_time_between_two_steps_is_in_no_span(tmp_path: Path) -> None:
    stack = _Stack().requires_grad_(False)
    source = ResidentSource({i: layer.experts for i, layer in enumerate(stack.layers)})
    with Trace(tmp_path / "trace.json") as trace:
        traced = TracedSource(source, trace, lambda: 0.0)
        with traced.watching(stack):
            ends = []
            for _ in range(2):
                stack(torch.randn(2, 8), Execution(LocalDispatcher(), traced))
                ends.append(trace.steps[-1].spans[-1].end_s)
    first = [span for span in trace.steps[-1].spans if span.start_s < ends[0]]
    assert not first
    assert {span.activity for span in trace.steps[0].spans} == {Activity.EXPERTS, Activity.REST}


def test_a_trace_is_a_file_of_complete_events(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Trace(path) as trace:
        trace.name_sections(SECTIONS)
        trace.begin_step()
        trace.record_read(read(1.0, 1.5, layer=2))
        trace.record_read(read(1.25, 1.75, Urgency.PREFETCH, layer=1, failed=True))
        trace.record_read(read(1.5, 2.0))
        trace.record_work(Activity.EXPERTS, 0, 0.75, 2.0)
    names = {
        event["tid"]: event["args"]["name"]
        for event in json.loads(path.read_text())
        if event["name"] == "thread_name"
    }
    assert names == {0: "compute", 1: "read 1", 2: "read 2"}
    spans = read_spans(path)
    assert [(s["tid"], s["cat"], s["name"], round(s["dur"]), s["args"]) for s in spans] == [
        (1, "reading", "layer 2, expert 0", 500_000, {"step": 0, "layer": 2, "bytes": 8}),
        (2, "reading ahead", "layer 1, expert 0 (failed)", 500_000, {"step": 0, "layer": 1, "bytes": 8}),
        (1, "reading", "layer 0, expert 0", 500_000, {"step": 0, "layer": 0, "bytes": 8}),
        (0, "experts", "layer 0: experts", 1_250_000, {"step": 0, "layer": 0, "bytes": 0}),
    ]
    assert spans[1]["ts"] - spans[0]["ts"] == pytest.approx(250_000)


def test_a_long_trace_keeps_no_more_than_a_picture_needs(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        for step in range(100):
            trace.begin_step()
            for i in range(5):
                trace.record_work(Activity.EXPERTS, 0, step + i / 10, step + i / 10 + 0.05)
    assert [step.number for step in trace.steps] == [0, 97, 98, 99]
    assert sum(len(step.spans) for step in trace.steps) == 20
    assert len(read_spans(tmp_path / "trace.json")) == 500


def test_a_timeline_is_a_picture_of_the_steps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = Trace()
    with pytest.raises(GenerationError, match="at least one token"):
        draw_timeline(trace, tmp_path / "empty.png")
    for step in range(4):
        trace.begin_step()
        trace.note_tokens(1 + 8 * (step == 0))
        trace.record_work(Activity.EXPERTS, 0, step, step + 1)
        trace.record_read(read(step + 0.5, step + 1.5))
    draw_timeline(trace, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
