"""What happened when: computing, waiting and reading as spans, in a file for Chrome's tracing and Perfetto.

A `Trace` writes spans as they come and keeps the few that a picture needs, so that it stays small however long a run
is. `TracedSource` stands before an expert source and tells it what the layers do. Changes nothing of what is computed.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor, nn

from moesys.kernels import BankView, ModuleView
from moesys.moe import ExpertKey, ExpertSource, Routing
from moesys.store import ReadEvent, Section, Urgency

MICROSECONDS = 1e6
NUM_LAST_STEPS = 3
"""Steps at the end of a run of which a trace keeps the spans, beside those of the first."""


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

    lane:            0 computes, the others read; spans of a lane do not overlap.
    start_s, end_s:  of `time.perf_counter`, in seconds.
    """

    activity: Activity
    name: str
    lane: int
    layer_id: int
    start_s: float
    end_s: float
    num_bytes: int = 0


@dataclass
class TracedStep:
    """A pass through the model: its number, from 0, its tokens, and what happened in it. A read is part of the step in
    which it ended."""

    number: int
    num_tokens: int
    spans: list[Span]


class Trace:
    """Collects spans; reads may be recorded from other threads. Close it, or use it as a context."""

    def __init__(self, path: Path | None = None) -> None:
        """path: file of all spans, complete when the trace is closed; None writes none. Raises `OSError`."""
        self._layer_of_section: dict[str, int] = {}
        self._first: TracedStep | None = None
        self._last: deque[TracedStep] = deque(maxlen=NUM_LAST_STEPS)
        self._step = TracedStep(-1, 0, [])
        self._lane_ends: list[float] = []
        self._lock = threading.Lock()
        self._origin_s = time.perf_counter()
        self._file: TextIO | None = None
        if path is not None:
            self._file = path.open("w", encoding="utf-8")
            self._file.write("[\n")
            self._write({"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "moesys"}}, "")
            self._name_lane(0, "compute")

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def steps(self) -> list[TracedStep]:
        """The first step and the last few, complete ones and the one under way."""
        others = [step for step in self._last if step is not self._first]
        return others if self._first is None else [self._first, *others]

    def close(self) -> None:
        """Completes the file."""
        with self._lock:
            if self._file is not None:
                self._file.write("\n]\n")
                self._file.close()
                self._file = None

    def name_sections(self, sections: Mapping[ExpertKey, Section]) -> None:
        """Says to which layer the sections belong that reads will name."""
        self._layer_of_section = {section.name: layer_id for (layer_id, _), section in sections.items()}

    def begin_step(self) -> None:
        """Says that a pass through the model begins."""
        with self._lock:
            self._step = TracedStep(self._step.number + 1, 0, [])
            self._first = self._first or self._step
            self._last.append(self._step)

    def note_tokens(self, num_tokens: int) -> None:
        """Says how many tokens the step has."""
        self._step.num_tokens = num_tokens

    def record_work(self, activity: Activity, layer_id: int, start_s: float, end_s: float) -> None:
        """Adds what the computing thread did."""
        with self._lock:
            self._add(Span(activity, f"layer {layer_id}: {activity}", 0, layer_id, start_s, end_s))

    def record_read(self, event: ReadEvent) -> None:
        """Adds what a `SectionReader` tells of a read."""
        activity = Activity.READ if event.urgency is Urgency.DEMAND else Activity.READ_AHEAD
        name = f"{event.section}{' (failed)' if event.failed else ''}"
        layer_id = self._layer_of_section.get(event.section, -1)
        with self._lock:
            lane = self._find_lane(event.started_s, event.finished_s)
            self._add(
                Span(activity, name, lane, layer_id, event.started_s, event.finished_s, event.num_bytes)
            )

    def _find_lane(self, start_s: float, end_s: float) -> int:
        """Returns a lane in which nothing ended after ``start_s``: reads are told of in the order in which they end."""
        for i, lane_end_s in enumerate(self._lane_ends):
            if lane_end_s <= start_s:
                self._lane_ends[i] = end_s
                return i + 1
        self._lane_ends.append(end_s)
        lane = len(self._lane_ends)
        self._name_lane(lane, f"read {lane}")
        return lane

    def _add(self, span: Span) -> None:
        if self._step is self._first or self._step in self._last:
            self._step.spans.append(span)
        self._write(
            {
                "ph": "X",
                "name": span.name,
                "cat": span.activity.value,
                "pid": 1,
                "tid": span.lane,
                "ts": (span.start_s - self._origin_s) * MICROSECONDS,
                "dur": (span.end_s - span.start_s) * MICROSECONDS,
                "args": {"step": self._step.number, "layer": span.layer_id, "bytes": span.num_bytes},
            }
        )

    def _name_lane(self, lane: int, name: str) -> None:
        self._write({"ph": "M", "name": "thread_name", "pid": 1, "tid": lane, "args": {"name": name}})

    def _write(self, event: dict[str, Any], separator: str = ",\n") -> None:
        if self._file is not None:
            self._file.write(separator + json.dumps(event))


class TracedSource:
    """An expert source that tells a `Trace` how long layers wait for the disk and how long they compute."""

    def __init__(self, source: ExpertSource, trace: Trace, read_stall_s: Callable[[], float]) -> None:
        """read_stall_s: returns for how many seconds the source has waited for the disk so far."""
        self._source = source
        self._trace = trace
        self._read_stall_s = read_stall_s
        self._busy_since: float | None = None
        self._last_layer = -1

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Takes every call of the model, while inside, as a step."""

        def begin(*_: object) -> None:
            self._trace.begin_step()
            self._busy_since = time.perf_counter()

        def end(*_: object) -> None:
            self._end_rest(self._last_layer, time.perf_counter())

        handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hint(self, layer_id: int, routing: Routing) -> None:
        """See `ExpertSource`."""
        self._trace.note_tokens(routing.num_tokens)
        self._source.hint(layer_id, routing)

    def acquire(self, layer_id: int, demand: Tensor) -> Generator[BankView | ModuleView, None, None]:
        """See `ExpertSource`. What is no waiting and no computing of experts is the rest."""
        self._last_layer = layer_id
        stalled_s = self._read_stall_s()
        with closing(self._source.acquire(layer_id, demand)) as views:
            for view in views:
                ready_s, stalled_before_s = time.perf_counter(), stalled_s
                stalled_s = self._read_stall_s()
                waited_s = stalled_s - stalled_before_s
                self._end_rest(layer_id, ready_s - waited_s)
                if waited_s > 0:
                    self._trace.record_work(Activity.WAIT, layer_id, ready_s - waited_s, ready_s)
                try:
                    yield view
                finally:
                    done_s = time.perf_counter()
                    self._trace.record_work(Activity.EXPERTS, layer_id, ready_s, done_s)
                    self._busy_since = done_s

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """See `ExpertSource`."""
        self._source.release(layer_id, view)

    def _end_rest(self, layer_id: int, end_s: float) -> None:
        if self._busy_since is not None and end_s > self._busy_since:
            self._trace.record_work(Activity.REST, layer_id, self._busy_since, end_s)
