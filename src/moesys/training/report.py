"""The report of a run: one HTML file that needs nothing else, and its plots as PNG files.

Knows how the page looks; does not know the model, the corpus, how a plot is drawn or how the numbers in its
summary were measured. The idea: everything is computed from the metrics file and a summary of plain values,
so a report can be made again long after the run.

The page holds no scripts and loads nothing: the plots are data URIs, the style sheet is inline, and a content
security policy forbids the rest. Every value passes through the template's escaping.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moesys.errors import DataError, MissingExtraError
from moesys.training.metrics import METRICS_FILE, RunMetrics, read_metrics
from moesys.training.plots import compute_heat_maps, draw_experts, draw_loss, draw_speed


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
