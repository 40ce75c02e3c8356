"""Many tensors' names in one line: the numbers in them as ranges.

Pure text; knows nothing of models. A checkpoint that lacks a layer lacks a hundred tensors, and all are to be told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def summarise_names(names: Iterable[str]) -> list[str]:
    """Returns the names, those that differ in numbers only as one: ``layers.{0-3}.experts.{0-7}.w1 (32 tensors)``.

    A number of tensors below the product of the ranges says that not every combination is meant.
    """
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        numbers = tuple(int(found) for found in _NUMBER.findall(name))
        groups.setdefault(_NUMBER.sub("{}", name), []).append(numbers)
    return [_summarise(template, found) for template, found in sorted(groups.items())]


def _summarise(template: str, found: list[tuple[int, ...]]) -> str:
    if len(found) == 1:
        return _fill(template, [str(number) for number in found[0]])
    ranges = [_format_range(sorted(set(numbers))) for numbers in zip(*found, strict=True)]
    return f"{_fill(template, ranges)} ({len(found)} tensors)"


def _fill(template: str, numbers: list[str]) -> str:
    pieces = template.split("{}")
    return pieces[0] + "".join(number + piece for number, piece in zip(numbers, pieces[1:], strict=True))


def _format_range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return "{" + ",".join(texts) + "}"
