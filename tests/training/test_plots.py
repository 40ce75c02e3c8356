"""The figures of a report: what is computed for them, and what is drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.training.metrics import EvaluationMetrics, RunMetrics, TrainMetrics
from moesys.training.plots import (
    compute_heat_maps,
    draw_experts,
    draw_loss,
    draw_speed,
    smooth,
    spread_labels,
)

MakeLine = Callable[[int, list[int], list[list[int]]], TrainMetrics]


def test_one_heat_map_per_moe_layer_with_loads_relative_to_an_even_share(
    train_lines: list[TrainMetrics],
) -> None:
    heat_maps = compute_heat_maps(train_lines)
    assert [heat_map.layer for heat_map in heat_maps] == [1, 3, 5]
    first, even, starved = heat_maps
    np.testing.assert_array_equal(first.step_edges, [0, 10, 20, 30, 35])
    np.testing.assert_allclose(first.relative_load, [[1.5] * 4, [0.5] * 4])
    np.testing.assert_allclose(even.relative_load, 1.0)
    np.testing.assert_allclose(starved.relative_load, [[2.0] * 4, [0.0] * 4])
    figure = draw_experts(heat_maps)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title for title in titles if title] == ["layer 1", "layer 3", "layer 5"]


def test_neighbouring_lines_of_a_long_run_are_added_up(make_line: MakeLine) -> None:
    train = [make_line(step, [0], [[step, 0, 2 * step]]) for step in range(1, 8)]
    [heat_map] = compute_heat_maps(train, max_columns=3)
    np.testing.assert_array_equal(heat_map.step_edges, [0, 3, 6, 7])
    np.testing.assert_allclose(heat_map.relative_load, [[1.0] * 3, [0.0] * 3, [2.0] * 3])


def test_an_interval_without_tokens_has_no_load(make_line: MakeLine) -> None:
    [heat_map] = compute_heat_maps([make_line(1, [0], [[0, 0]]), make_line(2, [0], [[1, 1]])])
    np.testing.assert_array_equal(heat_map.relative_load, [[np.nan, 1.0], [np.nan, 1.0]])
    [panel, _] = draw_experts([heat_map]).axes
    shown = np.ma.masked_invalid(panel.collections[0].get_array())
    np.testing.assert_array_equal(shown.mask, [[True, False], [True, False]])
    assert panel.collections[0].get_clim() == (0.5, 2.0)


def test_layers_may_have_different_numbers_of_experts(make_line: MakeLine) -> None:
    heat_maps = compute_heat_maps([make_line(1, [0, 1], [[1, 1], [1, 1, 1, 1]])])
    assert [heat_map.relative_load.shape for heat_map in heat_maps] == [(2, 1), (4, 1)]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_labels_are_apart_in_order_and_stay_where_there_is_room(positions: list[float]) -> None:
    moved = spread_labels(positions, gap=0.1)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    gaps = np.diff([moved[i] for i in order])
    assert (gaps >= 0.1 - 1e-9).all()
    assert sum(moved) == pytest.approx(sum(positions))
    if all(gap >= 0.1 for gap in np.diff(sorted(positions))):
        assert moved == pytest.approx(positions)


def test_smoothing_keeps_straight_lines_and_averages_noise() -> None:
    line = np.arange(20.0)
    np.testing.assert_allclose(smooth(line, 5), line)
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 0.0, 3.0, 0.0]), 3), [0, 1, 2, 1, 0])


def test_the_loss_plot_holds_the_curves_and_the_reference_lines(train_lines: list[TrainMetrics]) -> None:
    evaluation = EvaluationMetrics(35, 280, 35.0, 4.0, 2.5, 64)
    [axes] = draw_loss(RunMetrics(train_lines, [evaluation]), [("xz -9", 2.0), ("bz2", 2.02)]).axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.lines}
    np.testing.assert_allclose(lines["training, each log line"], [4.0 / line.step for line in train_lines])
    np.testing.assert_allclose(lines["held-out text"], [2.5])
    flat = [line[0] for line in lines.values() if len(line) == 2 and line[0] == line[1]]
    assert flat == [2.0, 2.02]
    assert [text.get_text() for text in axes.texts] == ["xz -9  2.00", "bz2  2.02"]


def test_the_speed_plot_names_the_median_and_its_share(train_lines: list[TrainMetrics]) -> None:
    [axes] = draw_speed(train_lines).axes
    assert axes.get_title(loc="left") == "Speed: median 1.0K tokens/s, 40% of the measured GEMM rate"
    assert axes.get_ylim()[0] == 0
