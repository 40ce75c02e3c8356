"""Sizes, counts and durations as people read them."""

from __future__ import annotations

import pytest

from moesys.errors import ConfigError
from moesys.units import format_bytes, format_count, format_duration, format_rate, parse_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (-1536, "-1.5 KiB"),
        (5 * 1024**2, "5.0 MiB"),
        (1.5 * 1024**3, "1.5 GiB"),
        (3 * 1024**4, "3.0 TiB"),
        (2048 * 1024**4, "2048.0 TiB"),
        (1024**2 - 1, "1.0 MiB"),
    ],
)
def test_format_bytes(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0K"),
        (-2500, "-2.5K"),
        (15_800_000, "15.8M"),
        (7.25e9, "7.2B"),
        (1.5e12, "1500.0B"),
        (999_999, "1.0M"),
    ],
)
def test_format_count(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (-3, "0:00"),
        (59.6, "1:00"),
        (123, "2:03"),
        (3599, "59:59"),
        (3723, "1:02:03"),
        (360_000, "100:00:00"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GiB", 8 * 1024**3), (" 1.5 KiB", 1536), ("7B", 7), ("2 TiB", 2 * 1024**4), ("0.5MiB", 512 * 1024)],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text, "--size") == num_bytes


@pytest.mark.parametrize(
    "text", ["8GB", "8", "8gib", "-1GiB", "0GiB", "0.1B", "1e9B", "1.GiB", "", "GiB", "٣GiB x"]
)
def test_parse_bytes_refuses_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--size .* must be a size above 0 with a unit of B, KiB"):
        parse_bytes(text, "--size")


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.05123, "0.0512"), (6.638, "6.64"), (999.4, "999"), (999.6, "1,000"), (1940.4, "1,940"), (0.0, "0")],
)
def test_rates_have_three_digits_and_no_exponent(rate: float, text: str) -> None:
    assert format_rate(rate) == text
