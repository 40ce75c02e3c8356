"""A model opened for writing text while a bar on stderr shows how much of it has been read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from moesys.cli.arguments import parse_product
from moesys.cli.memory_options import MemoryOptions
from moesys.cli.progress import show_bytes
from moesys.errors import ConfigError, DataError, GenerationError
from moesys.inference import (
    BatchStats,
    GenerationStats,
    OffloadRequest,
    OpenModel,
    RunMeter,
    RunReport,
    Trace,
    Watch,
    draw_timeline,
    find_packed_copy,
    open_model,
    require_drawing,
)


class OpenRun:
    """An open model, and what is said and written about how it runs within its budget. Without one, nothing is."""

    def __init__(self, opened: OpenModel, name: str, memory: MemoryOptions, trace: Trace | None) -> None:
        self.opened = opened
        self._name = name
        self._memory = memory
        self._trace = trace
        self._meter: RunMeter | None = None

    def report_plan(self) -> None:
        """Says on stderr what is in memory, and how fast that will be."""
        if self.opened.offloaded is not None:
            print(self.opened.offloaded.describe_plan(), file=sys.stderr)

    def begin(self) -> None:
        """Says that a text or a batch begins, of which `report_text` or `report_batch` will tell."""
        if self.opened.offloaded is not None:
            self._meter = RunMeter(self.opened.offloaded)

    def note_first_token(self) -> None:
        """Says that the text's prompt is computed."""
        if self._meter is not None:
            self._meter.note_first_token()

    def report_text(self, stats: GenerationStats) -> None:
        """Says on stderr what a text cost, and writes it where that was asked for."""
        if self._meter is not None:
            self._report(self._meter.report_text(stats))

    def report_batch(self, stats: BatchStats, num_texts: int) -> None:
        """The same of a batch of so many texts."""
        if self._meter is not None:
            self._report(self._meter.report_batch(stats, num_texts))

    def _report(self, report: RunReport) -> None:
        for line in report.describe():
            print(line, file=sys.stderr)
        if self._memory.stats is not None:
            self._memory.stats.write_text(json.dumps(report.encode(), indent=2) + "\n")

    def report_traffic(self) -> None:
        """Says on stderr what came from the disk in all."""
        if self.opened.offloaded is not None:
            print(self.opened.offloaded.describe_traffic(), file=sys.stderr)

    def write_files(self) -> None:
        """Draws the timeline and writes the recorded routing that were asked for."""
        if self._trace is not None and self._memory.timeline is not None:
            draw_timeline(self._trace, self._memory.timeline)
        recorder = None if self.opened.offloaded is None else self.opened.offloaded.recorder
        if recorder is not None and self._memory.record is not None:
            recorder.make_log(origin=self._name).write(self._memory.record)


@contextmanager
def open_behind_bar(
    path: Path, dtype: str | None, memory: MemoryOptions, request: OffloadRequest | None
) -> Iterator[OpenRun]:
    """Opens a model as `open_model` does; the bar has vanished before anything is done with it.

    request: what ``memory`` asks for. When the caller is done, or is stopped by Ctrl-C, its files are written.
    """
    product, name = parse_product(memory.product), path.resolve().name
    _require_writable(memory)
    with ExitStack() as opened:
        if memory.offload_dir is not None and request is not None:
            with show_bytes("packing") as on_progress:
                path = find_packed_copy(
                    path, memory.offload_dir, request, dtype=dtype, product=product, on_progress=on_progress
                )
        trace = None
        if memory.trace is not None or memory.timeline is not None:
            trace = opened.enter_context(Trace(memory.trace))
        watch = Watch(
            memory.usage, trace, tallies=memory.stats is not None, records=memory.record is not None
        )
        with show_bytes("loading") as on_progress:
            model = opened.enter_context(
                open_model(
                    path,
                    dtype=dtype,
                    product=product,
                    request=request,
                    watch=None if request is None else watch,
                    on_progress=on_progress,
                )
            )
        run = OpenRun(model, name, memory, trace)
        try:
            yield run
        except KeyboardInterrupt:
            # Before the first step is complete there is nothing to write.
            with suppress(DataError, GenerationError):
                run.write_files()
            raise
        run.write_files()


def _require_writable(memory: MemoryOptions) -> None:
    """Raises an error for files that could not be written when the work is done."""
    if memory.timeline is not None:
        require_drawing()
    files = {
        "--usage": memory.usage,
        "--trace": memory.trace,
        "--timeline": memory.timeline,
        "--stats": memory.stats,
        "--record": memory.record,
    }
    for name, path in files.items():
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{name} {path} cannot be written: it must be a file in a folder that exists")
