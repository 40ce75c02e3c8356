"""Whether the values of a record are what its fields say, before anything is built from them.

A ``config.json`` may hold a word where a number belongs, NaN, or a size of zero. Records are typed and say nothing of
it at run time; this reads their annotations, once for all families.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from moesys.errors import ModelFormatError
from moesys.models.config import DecoderConfig
from moesys.models.rope import compute_frequencies

_MAY_BE_ZERO = {"shared_intermediate_size", "bias_update_rate", "epsilon", "mscale", "mscale_all_dim"}


def require_sound(config: DecoderConfig) -> None:
    """Raises `ModelFormatError` naming the fields whose values cannot be meant: of another type, not finite, or not
    above zero; and for a rotary embedding without finite angles."""
    problems = list(dict.fromkeys(_find_problems(config)))
    if not config.feed_forwards:
        problems.append("the number of layers is 0, not above zero")
    if not problems:
        problems = [
            f"the rotary embedding {rope} has no finite angles"
            for rope in {mixer.rope for mixer in config.mixers}
            if rope is not None and not _has_finite_angles(rope)
        ]
    if problems:
        raise ModelFormatError(f"config.json holds values that no model has: {'; '.join(problems)}")


def _find_problems(record: Any) -> Iterator[str]:
    hints = _read_hints(type(record))
    for item in fields(record):
        value = getattr(record, item.name)
        for one in value if isinstance(value, tuple) else [value]:
            if is_dataclass(one):
                yield from _find_problems(one)
            elif reason := _find_problem(item.name, one, hints[item.name]):
                yield f"{item.name} is {one!r}, {reason}"


def _find_problem(name: str, value: Any, hint: Any) -> str | None:
    kinds = get_args(hint) or (hint,)
    if value is None:
        return None if type(None) in kinds else "which must be set"
    if bool in kinds:
        return None if isinstance(value, bool) else "not true or false"
    if float in kinds or int in kinds:
        if isinstance(value, bool) or not isinstance(value, (int, float) if float in kinds else int):
            return "not a number" if float in kinds else "not a whole number"
        if not math.isfinite(value):
            return "not finite"
        if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
            return "not above zero"
    return None


def _has_finite_angles(rope: Any) -> bool:
    try:
        frequencies, factor = compute_frequencies(rope)
    except (ArithmeticError, ValueError):
        return False
    return bool(frequencies.isfinite().all()) and math.isfinite(factor)


@cache
def _read_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
