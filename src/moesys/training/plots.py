"""The figures of a report: loss, expert load and speed over the run.

Knows a metrics file's records and how they are drawn; does not know the page or where files go. The idea:
what a figure shows is computed by plain functions on arrays, and drawing is the last, dumb step. matplotlib
is an extra and is imported only where something is drawn; no window system and no global figure is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesys.training.metrics import RunMetrics, TrainMetrics
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
