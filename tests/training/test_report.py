"""The report: a page that needs nothing else and executes nothing, and the plots beside it."""

from __future__ import annotations

import base64
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moesys.errors import DataError, MissingExtraError
from moesys.training.metrics import (
    METRICS_FILE,
    EventMetrics,
    MetricsWriter,
    Record,
    TrainMetrics,
)
from moesys.training.report import ReportSummary, write_report

MakeLine = Callable[[int, list[int], list[list[int]]], TrainMetrics]

HOSTILE = "</pre><script>alert('x')</script>&\"{{ 7 * 7 }}"
SUMMARY = ReportSummary(
    title="tiny <run>",
    facts=[("Hardware", "2 cores & 8 GiB")],
    comparisons=[("trained", 1.5), ("untrained", 8.0), ("diverged", math.nan)],
    reference_lines=[("xz -9", 2.0), ("bz2", 2.02)],
    samples=[("def f" + HOSTILE, "(x):" + HOSTILE)],
    config_toml='[model]\nname = "<b>"',
)


def write_run(folder: Path, *records: Record) -> None:
    with MetricsWriter(folder / METRICS_FILE) as writer:
        for record in records:
            writer.write(record)


def test_report_is_one_page_that_needs_nothing_else(tmp_path: Path, train_lines: list[TrainMetrics]) -> None:
    write_run(tmp_path, *train_lines, EventMetrics(20, 2.0, "skipped_step", "<i>NaN</i> & gone"))
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


def test_every_value_is_escaped(tmp_path: Path, train_lines: list[TrainMetrics]) -> None:
    write_run(tmp_path, *train_lines, EventMetrics(20, 2.0, "skipped_step", "<i>NaN</i> & gone"))
    html = write_report(tmp_path, SUMMARY, tmp_path / "report.html")[0].read_text(encoding="utf-8")
    escaped = "&lt;/pre&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&#34;{{ 7 * 7 }}"
    assert f'<span class="prompt">def f{escaped}</span>(x):{escaped}</pre>' in html
    assert "<h1>tiny &lt;run&gt;</h1>" in html
    assert "2 cores &amp; 8 GiB" in html
    assert "&lt;i&gt;NaN&lt;/i&gt; &amp; gone" in html
    assert "name = &#34;&lt;b&gt;&#34;" in html
    assert "<i>" not in html


def test_comparisons_show_their_figures_and_mark_the_best(
    tmp_path: Path, train_lines: list[TrainMetrics]
) -> None:
    write_run(tmp_path, *train_lines)
    html = write_report(tmp_path, SUMMARY, tmp_path / "report.html")[0].read_text(encoding="utf-8")
    rows = re.findall(r'<tr( class="best")?><td>(\w+)</td><td class="number">(\S+)</td>', html)
    assert rows == [
        (' class="best"', "trained", "1.500"),
        ("", "untrained", "8.000"),
        ("", "diverged", "nan"),
    ]
    assert re.findall(r"width: ([\d.]+)%\"", html) == ["18.8", "100.0", "0"]


def test_a_dense_model_has_no_expert_plot(tmp_path: Path, make_line: MakeLine) -> None:
    write_run(tmp_path, make_line(1, [], []))
    files = write_report(tmp_path, ReportSummary("dense"), tmp_path / "report.html")
    assert [file.name for file in files] == ["report.html", "loss.png", "speed.png"]


def test_a_run_that_diverged_can_still_be_drawn(tmp_path: Path, train_lines: list[TrainMetrics]) -> None:
    nan = math.nan
    write_run(tmp_path, *(replace(line, bits_per_byte=nan, tokens_per_s=nan) for line in train_lines))
    assert len(write_report(tmp_path, ReportSummary("diverged"), tmp_path / "report.html")) == 4


def test_a_run_without_training_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, EventMetrics(0, 0.0, "resumed", ""))
    with pytest.raises(DataError, match="holds no line of training"):
        write_report(tmp_path, SUMMARY, tmp_path / "report.html")


def test_matplotlib_that_is_not_installed_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_lines: list[TrainMetrics]
) -> None:
    write_run(tmp_path, *train_lines)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"'matplotlib'.*moesys\[plot\]"):
        write_report(tmp_path, SUMMARY, tmp_path / "report.html")
