"""JSON files that must hold one object, read with suspicion: no name twice, no nesting bomb, UTF-8 only.

Knows nothing of what the object means. A name that occurs twice is refused because readers differ in which of the
two they believe.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def parse_object(contents: bytes, *, is_strict: bool = False) -> dict[str, Any]:
    """Returns the JSON object that a file should hold; raises ValueError when it holds something else.

    is_strict: refuses NaN and Infinity too, which are not JSON and which Python writes all the same.
    """
    refuse = _refuse_constant if is_strict else None
    try:
        parsed = json.loads(contents.decode(), object_pairs_hook=_collect_pairs, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError("its JSON is not an object")
    return parsed


def parse_natural(what: str, value: object) -> int:
    """Returns a JSON value that must be a whole number from 0 to 2^63; raises ValueError otherwise."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"its {what} is {value!r}, not a whole number from 0 to 2^63")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"its JSON has {name}, which is no JSON")


def _collect_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    collected = dict(pairs)
    if len(collected) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"its JSON has the name {twice!r} twice in one object")
    return collected
