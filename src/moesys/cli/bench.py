"""``moesys bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moesys.moe.cache_study import MissCurve
    from moesys.moe.prediction_score import PredictionScore
    from moesys.moe.routing_log import RoutingLog

bench_app = typer.Typer(help="Measure parts of moesys on their own.", no_args_is_help=True)

_NUM_SIZES = 8


@bench_app.callback()
def _keep_name() -> None:
    """Measure parts of moesys on their own."""


@bench_app.command()
def cache(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="Recorded routing, a safetensors file.")],
    slots: Annotated[
        str | None,
        typer.Option(
            help="Numbers of experts in memory, such as 64,128,256.", show_default="from an eighth to all"
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Decode this many runs of the log's tokens together, a token of each per step.",
            show_default="as recorded",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the miss curves.", show_default="no plot")
    ] = None,
) -> None:
    """Replay recorded routing against caches of experts: what each policy loads at each size, beside the best possible
    (Belady's), and which guesses of the next layer would have been right.

    Example: `moesys bench cache benchmarks/results/routing-64x8.safetensors --slots 128,256`
    """
    from moesys.cli.bench_plot import draw_miss_curves, require_plot
    from moesys.moe.cache_study import compute_miss_curves, score_predictors
    from moesys.moe.routing_log import RoutingLog
    from moesys.store.policy import PolicyName

    if plot is not None:
        require_plot(plot)
    recorded = RoutingLog.read(log)
    if sequences is not None:
        recorded = recorded.regroup(sequences)
    sizes = _choose_sizes(len(recorded.keys), slots)
    curves = compute_miss_curves(recorded, sizes)
    middle = sizes[(len(sizes) - 1) // 2]
    scores = score_predictors(recorded, middle, PolicyName.LRFU)
    if as_json:
        print(json.dumps(_render_json(recorded, curves, middle, scores)))
    else:
        print("\n".join(_render_text(recorded, curves, middle, scores)))
    if plot is not None:
        draw_miss_curves(curves, recorded.num_tokens, plot)
        print(f"miss curves in {plot}", file=sys.stderr)


def _choose_sizes(num_experts: int, slots: str | None) -> list[int]:
    """Returns the numbers of slots, rising. Raises `ConfigError` for a text that is no list of them, and for more slots
    than experts."""
    from moesys.errors import ConfigError

    if slots is None:
        return [max(1, num_experts * i // _NUM_SIZES) for i in range(1, _NUM_SIZES + 1)]
    sizes = sorted({int(part) for part in slots.split(",") if part.strip().isdecimal()})
    if not sizes or sizes[0] < 1 or not all(part.strip().isdecimal() for part in slots.split(",")):
        raise ConfigError(f"--slots ({slots!r}) must be numbers of 1 or more, such as 64,128,256")
    if sizes[-1] > num_experts:
        raise ConfigError(
            f"--slots ({slots!r}) must not exceed the experts of the log, {num_experts}: more slots would stay empty"
        )
    return sizes


def _render_text(
    log: RoutingLog, curves: list[MissCurve], middle: int, scores: dict[str, PredictionScore]
) -> list[str]:
    num_experts = len(log.keys)
    lines = [
        f"{log.num_tokens} tokens in {log.num_steps} steps through {len(log.layer_ids)} layers, {num_experts} experts"
        + (f", recorded from {log.origin}" if log.origin else ""),
        "",
        "loads (share of the demands found in memory)",
        f"{'slots':>6} {'of all':>7}" + "".join(f"{curve.name:>18}" for curve in curves),
    ]
    for points in zip(*(curve.points for curve in curves), strict=True):
        size = points[0].num_slots
        cells = (f"{point.num_loads} ({point.hit_rate:.1%})" for point in points)
        lines.append(f"{size:>6} {size / num_experts:>7.0%}" + "".join(f"{cell:>18}" for cell in cells))
    lines += [
        "",
        f"guesses of what the next layer lacks, with {middle} slots",
        f"{'predictor':<16}{'precision':>10}{'recall':>8}{'guessed':>10}{'wasted':>10}",
    ]
    lines += [
        f"{name:<16}{score.precision:>10.1%}{score.recall:>8.1%}{score.num_guessed:>10}{score.num_wasted:>10}"
        for name, score in scores.items()
    ]
    return lines


def _render_json(
    log: RoutingLog, curves: list[MissCurve], middle: int, scores: dict[str, PredictionScore]
) -> dict[str, Any]:
    return {
        "origin": log.origin,
        "num_tokens": log.num_tokens,
        "num_steps": log.num_steps,
        "num_experts": len(log.keys),
        "curves": {
            curve.name: [
                {
                    "slots": point.num_slots,
                    "demands": point.num_demands,
                    "loads": point.num_loads,
                    "hit_rate": point.hit_rate,
                }
                for point in curve.points
            ]
            for curve in curves
        },
        "predictors": {
            name: {
                "slots": middle,
                "precision": score.precision,
                "recall": score.recall,
                "guessed": score.num_guessed,
                "right": score.num_right,
                "wasted": score.num_wasted,
                "missing": score.num_missing,
            }
            for name, score in scores.items()
        },
    }
