"""The report of a run: one HTML file that needs nothing else, and its plots as PNG files.

Knows how to draw a metrics file and how the page looks; does not know the model, the corpus or how the
figures in its summary were measured. The idea: everything is computed from the metrics file and a summary of
plain values, so a report can be made again long after the run.

The page holds no scripts and loads nothing: the plots are data URIs, the style sheet is inline, and a content
security policy forbids the rest. Every value passes through the template's escaping.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moesys.errors import DataError, MissingExtraError
from moesys.training.metrics import METRICS_FILE, RunMetrics, TrainMetrics, read_metrics
from moesys.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which readers with any of the common colour-vision deficiencies can tell apart.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE = "#A0447C"  # the palette's reddish purple, darkened until text in it is readable on white
INK, MUTED, RULE = "#222222", "#5f6368", "#dddddd"

MAX_COLUMNS = 240
"""Widest heat map, in columns; longer runs have neighbouring log intervals added up."""


@dataclass(frozen=True)
class ReportSummary:
    """What the report says besides what is in the metrics file; plain values, escaped when written."""

    title: str
    """Heading of the page."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    """Name and value: date, versions, hardware, parameters in total and active, where files are."""
    comparisons: list[tuple[str, float]] = field(default_factory=list)
    """Name and bits per byte of held-out text: the trained model, the untrained one, compressors."""
    reference_lines: list[tuple[str, float]] = field(default_factory=list)
    """Name and bits per byte of the horizontal lines in the loss plot."""
    samples: list[tuple[str, str]] = field(default_factory=list)
    """Prompt and the text that the model continued it with."""
    config_toml: str = ""
    """The resolved configuration."""


@dataclass(frozen=True)
class HeatMap:
    """The load of one MoE layer's experts over the run."""

    layer: int
    """Index of the layer in the decoder."""
    step_edges: np.ndarray
    """Shape [columns + 1], int64: column i covers the steps after edge i up to and including edge i + 1."""
    relative_load: np.ndarray
    """Shape [num_experts, columns], float64: share of the tokens x num_experts; 1 is an even share, NaN a
    column without tokens."""


def compute_heat_maps(train: Sequence[TrainMetrics], max_columns: int = MAX_COLUMNS) -> list[HeatMap]:
    """Returns one heat map per MoE layer, by layer, with at most ``max_columns`` columns."""
    layers = sorted({layer for line in train for layer in line.moe_layers})
    return [_compute_heat_map(train, layer, max_columns) for layer in layers]


def _compute_heat_map(train: Sequence[TrainMetrics], layer: int, max_columns: int) -> HeatMap:
    tokens = np.array([line.expert_tokens[line.moe_layers.index(layer)] for line in train], dtype=np.float64)
    num_lines, num_experts = tokens.shape
    lines_per_column = math.ceil(num_lines / max_columns)
    first_lines = np.arange(0, num_lines, lines_per_column)
    column_tokens = np.add.reduceat(tokens, first_lines, axis=0).T
    last_lines = np.append(first_lines[1:], num_lines) - 1
    edges = np.array([0, *(train[i].step for i in last_lines)])
    totals = column_tokens.sum(axis=0)
    shares = np.divide(column_tokens, totals, out=np.full_like(column_tokens, np.nan), where=totals > 0)
    return HeatMap(layer, edges, shares * num_experts)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean of about ``window`` values centred on each one; shape [n], float64.

    The window shrinks towards both ends so that it stays symmetric: a straight line is returned unchanged.
    """
    sums = np.cumsum(np.insert(values, 0, 0.0))
    places = np.arange(len(values))
    reach = np.minimum(window // 2, np.minimum(places, places[::-1]))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def spread_labels(positions: Sequence[float], gap: float) -> list[float]:
    """Moves positions apart until neighbours are at least ``gap`` apart, and each no further than it must.

    Returns the new positions in the given order. Groups that touch are moved as one block around their mean.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    blocks: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        blocks.append([index])
        centres.append(positions[index])
        while len(blocks) > 1:
            reach = gap * (len(blocks[-2]) + len(blocks[-1])) / 2
            if centres[-1] - centres[-2] >= reach:
                break
            merged = blocks[-2] + blocks[-1]
            blocks[-2:] = [merged]
            centres[-2:] = [sum(positions[i] for i in merged) / len(merged)]
    moved = list(positions)
    for block, centre in zip(blocks, centres, strict=True):
        for rank, index in enumerate(block):
            moved[index] = centre + gap * (rank - (len(block) - 1) / 2)
    return moved


def draw_loss(metrics: RunMetrics, reference_lines: Sequence[tuple[str, float]]) -> Figure:
    """Draws bits per byte over steps: training, held-out points, and reference lines named at the right."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = _new_figure(height_in=4.8)
    axes = figure.add_subplot()
    steps = np.array([line.step for line in metrics.train])
    bits = np.array([line.bits_per_byte for line in metrics.train])
    steps, bits = steps[np.isfinite(bits)], bits[np.isfinite(bits)]
    window = len(bits) // 30
    if window > 1:
        axes.plot(steps, bits, color=BLUE, alpha=0.3, linewidth=1, label="training, each log line")
        axes.plot(steps, smooth(bits, window), color=BLUE, linewidth=2, label="training, smoothed")
    else:
        axes.plot(steps, bits, color=BLUE, linewidth=1.5, marker=".", label="training, each log line")
    if metrics.evaluations:
        axes.plot(
            [line.step for line in metrics.evaluations],
            [line.heldout_bits_per_byte for line in metrics.evaluations],
            color=VERMILLION,
            marker="o",
            markersize=6,
            linewidth=1.2,
            label="held-out text",
        )
    for (_, value), style in zip(reference_lines, _cycle_styles(len(reference_lines)), strict=True):
        axes.axhline(value, color=style[0], linestyle=style[1], linewidth=1.3)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _style_axes(axes, "Loss", "optimizer step", "bits per byte of text (log scale)")
    axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=INK)
    _label_lines(axes, reference_lines)
    return figure


def _label_lines(axes: Axes, reference_lines: Sequence[tuple[str, float]]) -> None:
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    span = math.log(top / bottom)
    heights = [math.log(value / bottom) / span for _, value in reference_lines]
    styles = _cycle_styles(len(heights))
    for (name, value), height, place, style in zip(
        reference_lines, heights, spread_labels(heights, gap=0.06), styles, strict=True
    ):
        axes.annotate(
            f"{name}  {value:.2f}",
            xy=(1, height),
            xytext=(1.035, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=style[0],
            arrowprops={"arrowstyle": "-", "color": style[0], "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
        )


def draw_experts(heat_maps: Sequence[HeatMap]) -> Figure:
    """Draws one panel per MoE layer with a shared colour bar; blue is below an even share, red above."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    num_columns = 1 if len(heat_maps) <= 3 else 2 if len(heat_maps) <= 8 else 4
    num_rows = math.ceil(len(heat_maps) / num_columns)
    height_in = max(3.6, 0.8 + 2.0 * num_rows)
    figure = _new_figure(height_in)
    loads = np.concatenate([heat_map.relative_load.ravel() for heat_map in heat_maps])
    limit = _compute_colour_limit(loads)
    norm = LogNorm(1 / limit, limit)
    colours = colormaps["RdBu_r"].with_extremes(bad="#bbbbbb")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True)
    mesh = None
    for axes, heat_map in zip(grid.flat, heat_maps, strict=False):
        num_experts = heat_map.relative_load.shape[0]
        expert_edges = np.arange(num_experts + 1) - 0.5
        load = np.clip(heat_map.relative_load, 1 / limit, limit)
        mesh = axes.pcolormesh(
            heat_map.step_edges, expert_edges, load, cmap=colours, norm=norm, rasterized=True
        )
        axes.set_title(f"layer {heat_map.layer}", fontsize=10, color=INK, loc="left")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.tick_params(colors=MUTED, labelsize=8)
        axes.spines[:].set_color(RULE)
    for axes in grid.flat[len(heat_maps) :]:
        axes.set_visible(False)
    for column, axes in enumerate(grid[-1]):
        lowest = axes if axes.get_visible() else grid[-2, column]
        lowest.tick_params(labelbottom=True)
    figure.supxlabel("optimizer step", fontsize=10, color=INK)
    figure.supylabel("expert", fontsize=10, color=INK)
    figure.suptitle("Expert load", fontsize=13, fontweight="bold", color=INK, x=0.01, ha="left")
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=grid, extend="both", extendfrac=0.02, aspect=6 * height_in, pad=0.015)
    ticks = [2.0**power for power in range(-round(math.log2(limit)), round(math.log2(limit)) + 1)]
    bar.set_ticks(ticks, labels=[f"{tick:g}×" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(colors=MUTED, labelsize=9)
    bar.set_label("tokens relative to an even share", color=INK, fontsize=10)
    return figure


def _compute_colour_limit(loads: np.ndarray) -> int:
    busiest = float(np.max(loads, where=np.isfinite(loads), initial=1.0))
    return min(8, max(2, 2 ** math.ceil(math.log2(busiest))))


def draw_speed(train: Sequence[TrainMetrics]) -> Figure:
    """Draws tokens per second over steps, with the median and, where measured, its share of the GEMM rate."""
    from matplotlib.ticker import FuncFormatter

    figure = _new_figure(height_in=3.2)
    axes = figure.add_subplot()
    speeds = np.array([line.tokens_per_s for line in train])
    marker = "." if len(train) < 60 else None
    axes.plot([line.step for line in train], speeds, color=GREEN, linewidth=1.5, marker=marker)
    finite = speeds[np.isfinite(speeds)]
    title = "Speed"
    if len(finite):
        median = float(np.median(finite))
        axes.axhline(median, color=MUTED, linestyle="--", linewidth=1)
        title += f": median {format_count(median)} tokens/s"
    shares = [line.gemm_share for line in train if line.gemm_share is not None]
    if shares:
        title += f", {np.median(shares):.0%} of the measured GEMM rate"
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    _style_axes(axes, title, "optimizer step", "tokens per second")
    return figure


def require_matplotlib() -> None:
    """Raises MissingExtraError where matplotlib is missing; call it before a run that ends in a report."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing the report") from error


def write_report(run_dir: Path, summary: ReportSummary, output: Path) -> list[Path]:
    """Writes the report of the run in ``run_dir`` to ``output``, and its plots beside it.

    The plots are ``loss.png``, ``speed.png`` and, for a model with MoE layers, ``experts.png``. Returns every
    file written, the page first. Raises MissingExtraError without matplotlib, and DataError where the metrics
    file is damaged or holds no line of training.
    """
    require_matplotlib()
    metrics_path = run_dir / METRICS_FILE
    metrics = read_metrics(metrics_path)
    if not metrics.train:
        raise DataError(
            f"{metrics_path} holds no line of training; train for at least one log interval first"
        )
    plots = [
        ("loss.png", "Bits per byte over optimizer steps", draw_loss(metrics, summary.reference_lines)),
        ("speed.png", "Tokens per second over optimizer steps", draw_speed(metrics.train)),
    ]
    heat_maps = compute_heat_maps(metrics.train)
    if heat_maps:
        caption = "Share of the tokens that each expert got, per MoE layer; 1× is an even share"
        plots.insert(1, ("experts.png", caption, draw_experts(heat_maps)))
    output.parent.mkdir(parents=True, exist_ok=True)
    images = []
    for name, caption, figure in plots:
        path = output.with_name(name)
        figure.savefig(path, format="png", dpi=150)
        images.append((path, caption))
    output.write_text(_render_page(run_dir, summary, metrics, images), encoding="utf-8")
    return [output, *(path for path, _ in images)]


def _render_page(
    run_dir: Path, summary: ReportSummary, metrics: RunMetrics, images: Sequence[tuple[Path, str]]
) -> str:
    environment = ImmutableSandboxedEnvironment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    finite = [value for _, value in summary.comparisons if math.isfinite(value)]
    best, widest = min(finite, default=0.0), max(finite, default=1.0)
    return environment.from_string(_PAGE).render(
        summary=summary,
        comparisons=[
            {
                "name": name,
                "bits": f"{value:.3f}",
                "width": f"{100 * value / widest:.1f}" if math.isfinite(value) else "0",
                "best": value == best,
            }
            for name, value in summary.comparisons
        ],
        plots=[(base64.b64encode(path.read_bytes()).decode("ascii"), caption) for path, caption in images],
        events=metrics.events,
        files=[run_dir / METRICS_FILE, *(path for path, _ in images)],
    )


def _new_figure(height_in: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(9.6, height_in), layout="constrained", facecolor="white")


def _style_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=13, fontweight="bold", color=INK, loc="left", pad=10)
    axes.set_xlabel(x_label, fontsize=10, color=INK)
    axes.set_ylabel(y_label, fontsize=10, color=INK)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)


def _cycle_styles(count: int) -> list[tuple[str, str]]:
    styles = [(PURPLE, "--"), (INK, "--"), (PURPLE, ":"), (INK, ":"), (GREEN, "--"), (GREEN, ":")]
    return [styles[i % len(styles)] for i in range(count)]


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ summary.title }}</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1f2328; --muted: #5f6368;
  --rule: #d9dde3; --bar: #0072b2; --code: #f0f2f5; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --card: #1f2227; --ink: #e6e8eb;
  --muted: #a2a8b0; --rule: #353a42; --bar: #56b4e9; --code: #181b1f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 36px 0 12px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 20px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 12px 28px; margin: 0; }
dt { color: var(--muted); font-size: .82rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: .82rem; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-right: 20px; }
.wide { width: 45%; }
.bar { height: 12px; border-radius: 3px; background: var(--bar); opacity: .45; }
.best { font-weight: 700; }
.best .bar { opacity: 1; }
figure { margin: 0 0 18px; background: #ffffff; border: 1px solid var(--rule); border-radius: 10px;
  padding: 14px; }
img { display: block; width: 100%; height: auto; }
figcaption { color: #5f6368; font-size: .85rem; padding: 8px 4px 0; }
pre { background: var(--code); border-radius: 8px; padding: 14px 16px; margin: 0; font-size: .86rem;
  line-height: 1.5; font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.sample { margin-bottom: 14px; }
.prompt { font-weight: 700; color: var(--bar); }
details { margin-bottom: 12px; }
summary { cursor: pointer; font-weight: 600; }
details[open] > summary { margin-bottom: 12px; }
ul { margin: 0; padding-left: 20px; overflow-wrap: anywhere; }
@media print { figure, .card, .sample { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>{{ summary.title }}</h1>
{% if summary.facts %}
<dl class="card">
{% for name, value in summary.facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% if comparisons %}
<h2>Held-out text</h2>
<div class="card"><table>
<tr><th>coder</th><th class="number">bits per byte</th><th class="wide">lower is better</th></tr>
{% for row in comparisons %}
<tr{% if row.best %} class="best"{% endif %}><td>{{ row.name }}</td><td class="number">{{ row.bits }}</td>
<td class="wide"><div class="bar" style="width: {{ row.width }}%"></div></td></tr>
{% endfor %}
</table></div>
{% endif %}
<h2>The run</h2>
{% for data, caption in plots %}
<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ data }}">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if summary.samples %}
<h2>Samples</h2>
{% for prompt, continuation in summary.samples %}
<pre class="sample"><span class="prompt">{{ prompt }}</span>{{ continuation }}</pre>
{% endfor %}
{% endif %}
<h2>Details</h2>
{% if events %}
<details class="card"><summary>Events ({{ events | length }})</summary><table>
<tr><th class="number">step</th><th>event</th><th>message</th></tr>
{% for event in events %}
<tr><td class="number">{{ event.step }}</td><td>{{ event.event }}</td><td>{{ event.message }}</td></tr>
{% endfor %}
</table></details>
{% endif %}
{% if summary.config_toml %}
<details class="card"><summary>Configuration</summary><pre>{{ summary.config_toml }}</pre></details>
{% endif %}
<details class="card" open><summary>Files</summary><ul>
{% for file in files %}
<li>{{ file }}</li>
{% endfor %}
</ul></details>
</main>
</body>
</html>
"""
