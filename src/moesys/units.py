"""Sizes and rates as people write and read them. Knows nothing of what is being measured."""

from __future__ import annotations

import re

from moesys.errors import ConfigError

_BINARY_STEPS = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)")


def parse_bytes(text: str, option: str) -> int:
    """Returns the bytes of a size such as ``8GiB`` or ``1.5 MiB``; raises `ConfigError` that names the option."""
    found = _SIZE.fullmatch(text.strip())
    num_bytes = int(float(found[1]) * 1024 ** _BINARY_STEPS.index(found[2])) if found else 0
    if num_bytes < 1:
        raise ConfigError(
            f"{option} ({text!r}) must be a size above 0 with a unit of {', '.join(_BINARY_STEPS)}; try 8GiB"
        )
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """Returns a size in binary units, for example ``1.5 GiB``."""
    value = float(num_bytes)
    for unit in _BINARY_STEPS[:-1]:
        text = f"{value:.0f}" if unit == "B" else f"{value:.1f}"
        if abs(float(text)) < 1024:
            return f"{text} {unit}"
        value /= 1024
    return f"{value:.1f} {_BINARY_STEPS[-1]}"


def format_count(count: float) -> str:
    """Returns a count with a decimal suffix, for example ``15.8M``."""
    value = float(count)
    for suffix in ("", "K", "M"):
        text = f"{value:.1f}" if suffix else f"{value:.0f}"
        if abs(float(text)) < 1000:
            return f"{text}{suffix}"
        value /= 1000
    return f"{value:.1f}B"


def format_rate(per_second: float) -> str:
    """Returns a rate with three digits, or as many as its whole part has: ``0.0512``, ``6.64``, ``1,940``."""
    return f"{per_second:,.0f}" if abs(per_second) >= 999.5 else f"{per_second:.3g}"


def format_duration(seconds: float) -> str:
    """Returns a duration as ``1:02:03`` or ``2:03``."""
    total = max(0, round(seconds))
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
