"""What happened when: computing, waiting and reading as spans, and a file of them for Chrome's tracing and Perfetto.

A `Trace` collects; `TracedSource` stands before an expert source and tells it what the layers do. Knows nothing of how
sections are chosen, and changes nothing of what is computed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import Tensor

from moesys.checkpoint import write_text_atomic
from moesys.kernels import BankView, ModuleView
from moesys.moe import ExpertKey, ExpertSource, Routing
from moesys.store import ReadEvent, Section, Urgency

MICROSECONDS = 1e6


class Activity(StrEnum):
    """What a span of time was spent on."""

    REST = "attention and the rest"
    EXPERTS = "experts"
    WAIT = "waiting for the disk"
    READ = "reading"
    READ_AHEAD = "reading ahead"

    @property
    def is_reading(self) -> bool:
        """Whether it happens beside the computing thread."""
        return self in (Activity.READ, Activity.READ_AHEAD)


@dataclass(frozen=True)
class Span:
    """A piece of time.

    step:       passes through the model are counted from 0; a read has that in which it ended.
    start_s, end_s:  of `time.perf_counter`, in seconds.
    """

    activity: Activity
    name: str
    step: int
    layer_id: int
    start_s: float
    end_s: float
    num_bytes: int = 0


class Trace:
    """Collects spans. Reads may be recorded from other threads."""

    def __init__(self) -> None:
        self._layer_of_section: dict[str, int] = {}
        self.spans: list[Span] = []
        self.step = -1

    def name_sections(self, sections: Mapping[ExpertKey, Section]) -> None:
        """Says to which layer the sections belong that reads will name."""
        self._layer_of_section = {section.name: layer_id for (layer_id, _), section in sections.items()}

    def record_read(self, event: ReadEvent) -> None:
        """Adds what a `SectionReader` tells of a read."""
        activity = Activity.READ if event.urgency is Urgency.DEMAND else Activity.READ_AHEAD
        name = f"{event.section}{' (failed)' if event.failed else ''}"
        layer_id = self._layer_of_section.get(event.section, -1)
        self.spans.append(
            Span(activity, name, self.step, layer_id, event.started_s, event.finished_s, event.num_bytes)
        )

    def write(self, path: Path) -> None:
        """Writes the spans as Chrome's trace events (JSON): open the file in ui.perfetto.dev or chrome://tracing."""
        spans = sorted(self.spans, key=lambda span: span.start_s)
        origin = min((span.start_s for span in spans), default=0.0)
        lanes = assign_lanes(spans)
        names = {0: "computing thread", **{lane: f"read {lane}" for lane in sorted(set(lanes)) if lane}}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": lane, "args": {"name": name}}
            for lane, name in names.items()
        ]
        events += [
            {
                "ph": "X",
                "name": span.name,
                "cat": span.activity.value,
                "pid": 1,
                "tid": lane,
                "ts": (span.start_s - origin) * MICROSECONDS,
                "dur": (span.end_s - span.start_s) * MICROSECONDS,
                "args": {"step": span.step, "layer": span.layer_id, "bytes": span.num_bytes},
            }
            for span, lane in zip(spans, lanes, strict=True)
        ]
        write_text_atomic(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def assign_lanes(spans: list[Span]) -> list[int]:
    """Returns a lane for each span, so that none overlaps another: 0 computes, the others read.

    spans: in the order in which they start.
    """
    free_at: list[float] = []
    lanes = []
    for span in spans:
        if not span.activity.is_reading:
            lanes.append(0)
            continue
        lane = next((i for i, end_s in enumerate(free_at) if end_s <= span.start_s), len(free_at))
        if lane == len(free_at):
            free_at.append(0.0)
        free_at[lane] = span.end_s
        lanes.append(lane + 1)
    return lanes


class TracedSource:
    """An expert source that tells a `Trace` how long layers wait for weights and how long they compute."""

    def __init__(self, source: ExpertSource, trace: Trace) -> None:
        self._source = source
        self._trace = trace
        self._last_layer = -1
        self._busy_until: float | None = None

    def hint(self, layer_id: int, routing: Routing) -> None:
        """See `ExpertSource`."""
        if layer_id <= self._last_layer or self._last_layer < 0:
            self._trace.step += 1
        self._last_layer = layer_id
        self._source.hint(layer_id, routing)

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView | ModuleView]:
        """See `ExpertSource`."""
        start_s = time.perf_counter()
        if self._busy_until is not None:
            self._add(Activity.REST, layer_id, self._busy_until, start_s)
        for view in self._source.acquire(layer_id, demand):
            ready_s = time.perf_counter()
            self._add(Activity.WAIT, layer_id, start_s, ready_s)
            try:
                yield view
            finally:
                start_s = self._busy_until = time.perf_counter()
                self._add(Activity.EXPERTS, layer_id, ready_s, start_s)

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """See `ExpertSource`."""
        self._source.release(layer_id, view)

    def _add(self, activity: Activity, layer_id: int, start_s: float, end_s: float) -> None:
        name = f"layer {layer_id}: {activity}"
        self._trace.spans.append(Span(activity, name, self._trace.step, layer_id, start_s, end_s))
