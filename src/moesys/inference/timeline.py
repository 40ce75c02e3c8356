"""A picture of a trace: what computed and what was read when, one colour per layer. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from moesys.errors import GenerationError
from moesys.inference.trace import Activity, Span, Trace, TracedStep

_MILLISECONDS = 1e3
_HATCHES = {Activity.READ_AHEAD: "///", Activity.WAIT: "..."}
_FILLS = {Activity.WAIT: "white", Activity.REST: "lightgrey"}


def require_drawing() -> None:
    """Raises `GenerationError` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise GenerationError("a timeline needs matplotlib; install it: pip install 'moesys[plot]'")


def draw_timeline(trace: Trace, path: Path) -> None:
    """Writes a PNG of the first step, which computes a prompt or a part of it, and of the last ones.

    Raises `GenerationError` without matplotlib or for a trace without a step.
    """
    require_drawing()
    from matplotlib.figure import Figure

    steps = [step for step in trace.steps if step.spans]
    if not steps:
        raise GenerationError("the trace holds no step; generate at least one token before drawing it")
    panels = [steps[:1]] + ([steps[1:]] if len(steps) > 1 else [])
    num_layers = 1 + max(span.layer_id for step in steps for span in step.spans)
    figure = Figure(figsize=(12, 2.6 * len(panels) + 1), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, shown in zip(axes, panels, strict=True):
        _draw_panel(axis, shown, num_layers)
    figure.legend(handles=_make_legend(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, format="png", dpi=130)


def _draw_panel(axis: Any, steps: list[TracedStep], num_layers: int) -> None:
    from matplotlib import colormaps

    spans = [span for step in steps for span in step.spans]
    origin = min((span.start_s for span in spans if not span.activity.is_reading), default=spans[0].start_s)
    colours = colormaps["viridis"].resampled(max(num_layers, 2))
    for span in spans:
        axis.barh(
            -span.lane,
            (span.end_s - span.start_s) * _MILLISECONDS,
            left=(span.start_s - origin) * _MILLISECONDS,
            height=0.8,
            color=_FILLS.get(span.activity, colours(span.layer_id)),
            hatch=_HATCHES.get(span.activity),
            edgecolor="grey" if span.activity in _HATCHES else "none",
            linewidth=0.3,
        )
    lanes = sorted({span.lane for span in spans if span.lane})
    axis.set_yticks([0, *(-lane for lane in lanes)], ["compute", *(f"read {lane}" for lane in lanes)])
    axis.tick_params(labelsize=8)
    axis.set_title(_describe_steps(steps), fontsize=10, loc="left")
    axis.set_xlabel("ms; colours are layers, the first dark", fontsize=8)
    axis.set_xlim(left=_find_left(spans, origin))


def _find_left(spans: list[Span], origin: float) -> float:
    return min(0.0, *((span.start_s - origin) * _MILLISECONDS for span in spans))


def _describe_steps(steps: list[TracedStep]) -> str:
    sizes = sorted({step.num_tokens for step in steps})
    tokens = (
        f"{sizes[0]} token{'s' if sizes[0] > 1 else ''}"
        if len(sizes) == 1
        else f"{sizes[0]} to {sizes[-1]} tokens"
    )
    numbers = (
        f"step {steps[0].number}" if len(steps) == 1 else f"steps {steps[0].number} to {steps[-1].number}"
    )
    return f"{numbers}: {tokens}{' each' if len(steps) > 1 else ''}"


def _make_legend() -> list[Any]:
    from matplotlib.patches import Patch

    return [
        Patch(facecolor="tab:green", label="experts computed, or an expert read"),
        Patch(facecolor="white", edgecolor="grey", hatch="///", label="read ahead"),
        Patch(facecolor="white", edgecolor="grey", hatch="...", label="waiting for the disk"),
        Patch(facecolor="lightgrey", edgecolor="grey", label="attention and the rest"),
    ]
