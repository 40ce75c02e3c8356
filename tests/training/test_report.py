"""The report: its data, its plots, and a page that needs nothing else and executes nothing."""

from __future__ import annotations

import base64
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.errors import DataError, MissingExtraError
from moesys.training.metrics import (
    METRICS_FILE,
    EvaluationMetrics,
    EventMetrics,
    MetricsWriter,
    Record,
    RunMetrics,
    TrainMetrics,
)
from moesys.training.report import (
    ReportSummary,
    compute_heat_maps,
    draw_experts,
    draw_loss,
    draw_speed,
    smooth,
    spread_labels,
    write_report,
)

HOSTILE = "</pre><script>alert('x')</script>&\"{{ 7 * 7 }}"
SUMMARY = ReportSummary(
    title="tiny <run>",
    facts=[("Hardware", "2 cores & 8 GiB")],
    comparisons=[("trained", 1.5), ("untrained", 8.0), ("diverged", math.nan)],
    reference_lines=[("xz -9", 2.0), ("bz2", 2.02)],
    samples=[("def f" + HOSTILE, "(x):" + HOSTILE)],
    config_toml='[model]\nname = "<b>"',
)


def make_line(step: int, moe_layers: list[int], expert_tokens: list[list[int]]) -> TrainMetrics:
    return TrainMetrics(
        step=step,
        tokens=step * 8,
        elapsed_s=float(step),
        loss=5.0 / step,
        bits_per_byte=4.0 / step,
        learning_rate=1e-3,
        gradient_norm=1.0,
        tokens_per_s=1000.0 + step,
        gemm_share=0.4,
        balance_loss=1.0,
        router_z_loss=0.1,
        moe_layers=moe_layers,
        expert_tokens=expert_tokens,
        imbalance=1.5,
        routing_entropy=0.9,
        router_confidence=0.4,
        dropped=0,
    )


TRAIN = [make_line(step, [1, 3, 5], [[3, 1], [2, 2], [4, 0]]) for step in (10, 20, 30, 35)]


def write_run(folder: Path, *records: Record) -> None:
    with MetricsWriter(folder / METRICS_FILE) as writer:
        for record in records:
            writer.write(record)


def test_one_heat_map_per_moe_layer_with_loads_relative_to_an_even_share() -> None:
    heat_maps = compute_heat_maps(TRAIN)
    assert [heat_map.layer for heat_map in heat_maps] == [1, 3, 5]
    first, even, starved = heat_maps
    np.testing.assert_array_equal(first.step_edges, [0, 10, 20, 30, 35])
    np.testing.assert_allclose(first.relative_load, [[1.5] * 4, [0.5] * 4])
    np.testing.assert_allclose(even.relative_load, 1.0)
    np.testing.assert_allclose(starved.relative_load, [[2.0] * 4, [0.0] * 4])
    figure = draw_experts(heat_maps)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title for title in titles if title] == ["layer 1", "layer 3", "layer 5"]


def test_neighbouring_lines_of_a_long_run_are_added_up() -> None:
    train = [make_line(step, [0], [[step, 0, 2 * step]]) for step in range(1, 8)]
    [heat_map] = compute_heat_maps(train, max_columns=3)
    np.testing.assert_array_equal(heat_map.step_edges, [0, 3, 6, 7])
    np.testing.assert_allclose(heat_map.relative_load, [[1.0] * 3, [0.0] * 3, [2.0] * 3])


def test_an_interval_without_tokens_has_no_load() -> None:
    [heat_map] = compute_heat_maps([make_line(1, [0], [[0, 0]]), make_line(2, [0], [[1, 1]])])
    np.testing.assert_array_equal(heat_map.relative_load, [[np.nan, 1.0], [np.nan, 1.0]])
    [panel, _] = draw_experts([heat_map]).axes
    shown = np.ma.masked_invalid(panel.collections[0].get_array())
    np.testing.assert_array_equal(shown.mask, [[True, False], [True, False]])
    assert panel.collections[0].get_clim() == (0.5, 2.0)


def test_layers_may_have_different_numbers_of_experts() -> None:
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


def test_the_loss_plot_holds_the_curves_and_the_reference_lines() -> None:
    evaluation = EvaluationMetrics(35, 280, 35.0, 4.0, 2.5, 64)
    [axes] = draw_loss(RunMetrics(TRAIN, [evaluation]), SUMMARY.reference_lines).axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.lines}
    np.testing.assert_allclose(lines["training, each log line"], [4.0 / line.step for line in TRAIN])
    np.testing.assert_allclose(lines["held-out text"], [2.5])
    flat = [line[0] for line in lines.values() if len(line) == 2 and line[0] == line[1]]
    assert flat == [2.0, 2.02]
    assert [text.get_text() for text in axes.texts] == ["xz -9  2.00", "bz2  2.02"]


def test_the_speed_plot_names_the_median_and_its_share() -> None:
    [axes] = draw_speed(TRAIN).axes
    assert axes.get_title(loc="left") == "Speed: median 1.0K tokens/s, 40% of the measured GEMM rate"
    assert axes.get_ylim()[0] == 0


def test_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path, *TRAIN, EventMetrics(20, 2.0, "skipped_step", "<i>NaN</i> & gone"))
    page, *plots = write_report(tmp_path, SUMMARY, tmp_path / "out" / "report.html")
    assert page == tmp_path / "out" / "report.html"
    assert [plot.name for plot in plots] == ["loss.png", "experts.png", "speed.png"]
    html = page.read_text(encoding="utf-8")

    sources = re.findall(r'src="([^"]*)"', html)
    prefix = "data:image/png;base64,"
    assert [base64.b64decode(source.removeprefix(prefix)) for source in sources] == [
        plot.read_bytes() for plot in plots
    ]
    for plot in plots:
        data = plot.read_bytes()
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        assert data.startswith(b"\x89PNG")
        assert width == 1440
        assert height >= 480
        assert len(data) > 10_000
    assert not re.search(r"https?://|<script|<link|<iframe|url\(|@import|href=", html)
    assert "default-src 'none'" in html


def test_every_value_is_escaped(tmp_path: Path) -> None:
    write_run(tmp_path, *TRAIN, EventMetrics(20, 2.0, "skipped_step", "<i>NaN</i> & gone"))
    html = write_report(tmp_path, SUMMARY, tmp_path / "report.html")[0].read_text(encoding="utf-8")
    escaped = "&lt;/pre&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&#34;{{ 7 * 7 }}"
    assert f'<span class="prompt">def f{escaped}</span>(x):{escaped}</pre>' in html
    assert "<h1>tiny &lt;run&gt;</h1>" in html
    assert "2 cores &amp; 8 GiB" in html
    assert "&lt;i&gt;NaN&lt;/i&gt; &amp; gone" in html
    assert "name = &#34;&lt;b&gt;&#34;" in html
    assert "<i>" not in html


def test_comparisons_show_their_figures_and_mark_the_best(tmp_path: Path) -> None:
    write_run(tmp_path, *TRAIN)
    html = write_report(tmp_path, SUMMARY, tmp_path / "report.html")[0].read_text(encoding="utf-8")
    rows = re.findall(r'<tr( class="best")?><td>(\w+)</td><td class="number">(\S+)</td>', html)
    assert rows == [
        (' class="best"', "trained", "1.500"),
        ("", "untrained", "8.000"),
        ("", "diverged", "nan"),
    ]
    assert re.findall(r"width: ([\d.]+)%\"", html) == ["18.8", "100.0", "0"]


def test_a_dense_model_has_no_expert_plot(tmp_path: Path) -> None:
    write_run(tmp_path, make_line(1, [], []))
    files = write_report(tmp_path, ReportSummary("dense"), tmp_path / "report.html")
    assert [file.name for file in files] == ["report.html", "loss.png", "speed.png"]


def test_a_run_that_diverged_can_still_be_drawn(tmp_path: Path) -> None:
    nan = math.nan
    write_run(tmp_path, *(replace(line, bits_per_byte=nan, tokens_per_s=nan) for line in TRAIN))
    assert len(write_report(tmp_path, ReportSummary("diverged"), tmp_path / "report.html")) == 4


def test_a_run_without_training_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, EventMetrics(0, 0.0, "resumed", ""))
    with pytest.raises(DataError, match="holds no line of training"):
        write_report(tmp_path, SUMMARY, tmp_path / "report.html")


def test_matplotlib_that_is_not_installed_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, *TRAIN)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"'matplotlib'.*moesys\[plot\]"):
        write_report(tmp_path, SUMMARY, tmp_path / "report.html")
