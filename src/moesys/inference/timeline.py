"""A picture of a trace: what computed and what was read when, one colour per layer. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from moesys.errors import GenerationError
from moesys.inference.trace import Activity, Span, Trace, assign_lanes

_LAST_STEPS = 3
_MILLISECONDS = 1e3
_HATCHES = {Activity.READ_AHEAD: "///", Activity.WAIT: "...", Activity.REST: ""}


def require_drawing() -> None:
    """Raises `GenerationError` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise GenerationError("a timeline needs matplotlib; install it: pip install 'moesys[plot]'")


def draw_timeline(trace: Trace, path: Path) -> None:
    """Writes a PNG of the first step, which reads the prompt, and of the last three, which write a token each.

    Raises `GenerationError` without matplotlib or for a trace without a step.
    """
    require_drawing()
    from matplotlib.figure import Figure

    steps = sorted({span.step for span in trace.spans if span.step >= 0})
    if not steps:
        raise GenerationError("the trace holds no step; generate at least one token before drawing it")
    panels = {f"step {steps[0]}: the prompt": steps[:1]}
    if len(steps) > 1:
        last = steps[1:][-_LAST_STEPS:]
        panels[f"steps {last[0]} to {last[-1]}: a token each"] = last
    num_layers = 1 + max(span.layer_id for span in trace.spans)
    figure = Figure(figsize=(12, 2.6 * len(panels) + 1), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, chosen) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, title, [span for span in trace.spans if span.step in chosen], num_layers)
    figure.legend(handles=_make_legend(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=130)


def _draw_panel(axis: Any, title: str, spans: list[Span], num_layers: int) -> None:
    from matplotlib import colormaps

    spans = sorted(spans, key=lambda span: span.start_s)
    origin = min((span.start_s for span in spans if not span.activity.is_reading), default=0.0)
    lanes = assign_lanes(spans)
    colours = colormaps["viridis"].resampled(max(num_layers, 2))
    for span, lane in zip(spans, lanes, strict=True):
        start_ms = (span.start_s - origin) * _MILLISECONDS
        width_ms = (span.end_s - span.start_s) * _MILLISECONDS
        is_blank = span.activity in (Activity.WAIT, Activity.REST)
        axis.barh(
            -lane,
            width_ms,
            left=start_ms,
            height=0.8,
            color=("white" if span.activity is Activity.WAIT else "lightgrey")
            if is_blank
            else colours(span.layer_id),
            hatch=_HATCHES.get(span.activity),
            edgecolor="grey" if span.activity in _HATCHES else "none",
            linewidth=0.3,
        )
    num_reads = max(lanes, default=0)
    axis.set_yticks(
        [0, *range(-1, -num_reads - 1, -1)],
        ["compute", *(f"read {i + 1}" for i in range(num_reads))],
        fontsize=8,
    )
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("ms; colours are layers, the first dark", fontsize=8)
    axis.set_xlim(left=min(0.0, *((s.start_s - origin) * _MILLISECONDS for s in spans)))


def _make_legend() -> list[Any]:
    from matplotlib.patches import Patch

    return [
        Patch(facecolor="tab:green", label="experts computed, or an expert read"),
        Patch(facecolor="white", edgecolor="grey", hatch="///", label="read ahead"),
        Patch(facecolor="white", edgecolor="grey", hatch="...", label="waiting for the disk"),
        Patch(facecolor="lightgrey", edgecolor="grey", label="attention and the rest"),
    ]
