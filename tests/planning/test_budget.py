"""Budgets as people write them."""

from __future__ import annotations

import pytest

from moesys.errors import ConfigError
from moesys.planning import Budget, parse_budget


@pytest.mark.parametrize(
    ("text", "size_bytes", "is_share"),
    [
        ("8GiB", 8 * 2**30, False),
        (" 1.5 MiB ", 3 * 2**19, False),
        ("50%", 500, True),
        ("100 %", 1000, True),
        ("0.1%", 1, True),
    ],
)
def test_a_size_or_a_share_of_the_weights(text: str, size_bytes: int, is_share: bool) -> None:
    assert parse_budget(text, "--host-memory", "RAM", weight_bytes=1000) == Budget(
        "RAM", size_bytes, is_share
    )


@pytest.mark.parametrize(
    "text", ["8GB", "8", "GiB", "-1GiB", "0GiB", "", "50%GiB", "0%", "101%", "-5%", "nan%"]
)
def test_what_is_neither_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--host-memory"):
        parse_budget(text, "--host-memory", "RAM", weight_bytes=1000)
