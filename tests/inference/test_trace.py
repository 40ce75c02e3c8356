"""Traces: every span is there once, on a lane of its own time, in a file that Perfetto's format describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesys.errors import GenerationError
from moesys.inference.timeline import draw_timeline
from moesys.inference.trace import Activity, Span, Trace, TracedSource, assign_lanes
from moesys.kernels import BankView, ModuleView
from moesys.moe import Execution, LocalDispatcher, MoEConfig, MoELayer, ResidentSource, Routing
from moesys.store import Extent, ReadEvent, Section, StoredFile, Urgency

FILE = StoredFile(Path("/nowhere"), 0, 0, 0, 0)
SECTIONS = {(layer, 0): Section(f"layer {layer}, expert 0", (Extent(FILE, 0, 8, 0),)) for layer in range(3)}


def make_span(start_s: float, end_s: float, activity: Activity = Activity.READ, step: int = 0) -> Span:
    return Span(activity, "x", step, 0, start_s, end_s)


def test_reads_that_overlap_lie_on_lanes_of_their_own() -> None:
    spans = [
        make_span(0, 4, Activity.EXPERTS),
        make_span(0, 2),
        make_span(1, 3, Activity.READ_AHEAD),
        make_span(2, 5),
        make_span(3, 6),
    ]
    assert assign_lanes(spans) == [0, 1, 2, 1, 2]


class _TwoViews:
    """A source that hands out a layer's experts in two views."""

    def __init__(self, inner: ResidentSource) -> None:
        self._inner = inner
        self.num_released = 0

    def hint(self, layer_id: int, routing: Routing) -> None:
        self._inner.hint(layer_id, routing)

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView | ModuleView]:
        (view,) = self._inner.acquire(layer_id, demand)
        assert isinstance(view, BankView)
        for first in (0, 2):
            table = torch.full((4,), -1)
            table[first : first + 2] = torch.arange(first, first + 2)
            yield BankView(view.gate_up_SFD, view.down_SDF, table)

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        self.num_released += 1


def test_a_traced_source_changes_nothing_and_tells_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [MoELayer(8, MoEConfig(4, 4, 6), layer_id=i) for i in range(3)]
    x = torch.randn(5, 8)
    trace = Trace()
    trace.name_sections(SECTIONS)
    source = _TwoViews(ResidentSource({i: layer.experts for i, layer in enumerate(layers)}))
    execution = Execution(LocalDispatcher(), TracedSource(source, trace))
    plain = Execution(
        LocalDispatcher(), _TwoViews(ResidentSource({i: layer.experts for i, layer in enumerate(layers)}))
    )
    with torch.no_grad():
        for _ in range(2):
            for layer in layers:
                assert torch.equal(layer(x, execution)[0], layer(x, plain)[0])
    assert source.num_released == 12
    computed = [span for span in trace.spans if span.activity is Activity.EXPERTS]
    assert [(span.step, span.layer_id) for span in computed] == [
        (step, layer) for step in (0, 1) for layer in (0, 1, 2) for _ in range(2)
    ]
    mine = [span for span in trace.spans if not span.activity.is_reading]
    ends = sorted((span.start_s, span.end_s) for span in mine)
    assert all(end <= start for (_, end), (start, _) in zip(ends, ends[1:], strict=False))
    rests = [span for span in trace.spans if span.activity is Activity.REST]
    assert len(rests) == 5


def test_a_trace_is_a_file_of_complete_events(tmp_path: Path) -> None:
    trace = Trace()
    trace.name_sections(SECTIONS)
    trace.step = 4
    trace.record_read(ReadEvent("layer 2, expert 0", 8, 0.5, 1.0, 1.5, Urgency.DEMAND, failed=False))
    trace.record_read(ReadEvent("layer 1, expert 0", 8, 0.5, 1.25, 1.75, Urgency.PREFETCH, failed=True))
    trace.spans.append(make_span(0.75, 2.0, Activity.EXPERTS, step=4))
    path = tmp_path / "trace.json"
    trace.write(path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {0: "computing thread", 1: "read 1", 2: "read 2"}
    complete = [event for event in events if event["ph"] == "X"]
    assert [(e["tid"], e["cat"], e["ts"], e["dur"], e["args"]) for e in complete] == [
        (0, "experts", 0.0, 1.25e6, {"step": 4, "layer": 0, "bytes": 0}),
        (1, "reading", 0.25e6, 0.5e6, {"step": 4, "layer": 2, "bytes": 8}),
        (2, "reading ahead", 0.5e6, 0.5e6, {"step": 4, "layer": 1, "bytes": 8}),
    ]
    assert complete[2]["name"] == "layer 1, expert 0 (failed)"


def test_a_timeline_is_a_picture_of_the_steps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = Trace()
    trace.name_sections(SECTIONS)
    with pytest.raises(GenerationError, match="at least one token"):
        draw_timeline(trace, tmp_path / "empty.png")
    trace.spans += [make_span(step, step + 1, Activity.EXPERTS, step) for step in range(4)]
    trace.spans += [make_span(step + 0.5, step + 1.5, Activity.READ, step) for step in range(4)]
    draw_timeline(trace, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
