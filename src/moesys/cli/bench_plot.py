"""The miss curves of ``moesys bench cache`` as a picture. matplotlib is an extra and is imported only here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesys.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from moesys.moe.cache_study import MissCurve

# Okabe and Ito's palette, which readers with any of the common colour-vision deficiencies can tell apart.
_STYLES = (("#222222", "--"), ("#0072B2", "-"), ("#D55E00", "-"), ("#A0447C", "-"), ("#009E73", "-"))
_INK, _MUTED, _RULE = "#222222", "#5f6368", "#dddddd"


def require_plot(path: Path) -> None:
    """Raises `MissingExtraError` without matplotlib, and `ConfigError` for a file that is not to be a PNG or could not
    be written; call it before what takes long."""
    if path.suffix != ".png":
        raise ConfigError(f"--plot ({path}) must end in .png")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path} cannot be written: it must be a file in a folder that exists")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing the miss curves") from error


def draw_miss_curves(curves: Sequence[MissCurve], num_tokens: int, path: Path) -> None:
    """Draws loads per token over slots, one line per policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for curve, (colour, line) in zip(curves, _STYLES, strict=True):
        axes.plot(
            [point.num_slots for point in curve.points],
            [point.num_loads / num_tokens for point in curve.points],
            color=colour,
            linestyle=line,
            marker="o",
            markersize=4,
            linewidth=1.5,
            label=curve.name,
        )
    axes.set_title("Experts loaded per token", fontsize=13, fontweight="bold", color=_INK, loc="left", pad=10)
    axes.set_xlabel("experts in memory", fontsize=10, color=_INK)
    axes.set_ylabel("loads per token", fontsize=10, color=_INK)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=_MUTED, labelsize=9)
    axes.grid(color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)
    axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=_INK)
    figure.savefig(path, dpi=120)
