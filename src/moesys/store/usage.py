"""How often sections were used, kept between runs, so that the next one begins with what is likely to be needed.

Knows sections by name only. A profile belongs to one model, whose name or fingerprint it carries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moesys.errors import DataError
from moesys.store.events import Urgency

if TYPE_CHECKING:
    from moesys.store.cache import SectionCache

_FORMAT = "moesys-usage"
_VERSION = 1

UsageKey = tuple[int, ...]
"""Numbers that name a section, such as (layer, expert)."""


@dataclass(frozen=True)
class UsageProfile:
    """Uses by section.

    model:  whose sections they are: whatever tells models apart, such as a checksum of its configuration.
    """

    model: str
    counts: Mapping[UsageKey, float]

    def list_most_used(self, count: int, among: Container[UsageKey]) -> list[UsageKey]:
        """Returns the ``count`` sections with the most uses, most first; among equals by name."""
        return sorted(filter(among.__contains__, self.counts), key=lambda key: (-self.counts[key], key))[
            :count
        ]

    def follow(self, counts: Mapping[UsageKey, float], keep: float = 0.5) -> UsageProfile:
        """Returns the profile after a run that made these counts; what is older counts ``keep`` times as much, so that
        the profile follows what a model is used for."""
        sections = [*self.counts, *(key for key in counts if key not in self.counts)]
        added = {key: keep * self.counts.get(key, 0.0) + counts.get(key, 0.0) for key in sections}
        return replace(self, counts=added)

    def write(self, path: Path) -> None:
        """Writes the profile as JSON; a file of that name is replaced when the new one is complete. Raises
        `OSError`."""
        entries = [[*key, value] for key, value in sorted(self.counts.items())]
        content = {"format": _FORMAT, "version": _VERSION, "model": self.model, "counts": entries}
        draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.replace(path)

    @classmethod
    def read(cls, path: Path, model: str) -> UsageProfile:
        """Reads the profile of a model. Raises `DataError` for another file or another model's, and `OSError` where
        there is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not a usage profile ({error}); give another file") from None
        if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (
            _FORMAT,
            _VERSION,
        ):
            raise DataError(f"{path} is not a usage profile of version {_VERSION}; give another file")
        if content.get("model") != model:
            raise DataError(
                f"{path} is the usage profile of {content.get('model')!r}, and the model is {model!r}; give this model "
                "a profile of its own"
            )
        return cls(model, _parse_counts(content.get("counts"), path))


def preload(cache: SectionCache, usage: UsageProfile, sections: Container[UsageKey]) -> int:
    """Starts to load those of a cache's sections that were used most into its free slots and returns how many.

    The most used come last, so that they are the youngest for whoever throws out what is old.
    """
    keys = usage.list_most_used(cache.pool.num_slots, among=sections)
    missing = [key for key in reversed(keys) if not cache.is_here(key)]
    started = missing[max(0, len(missing) - cache.describe().num_free) :]
    for key in started:
        cache.start(key, Urgency.PREFETCH)
    return len(started)


def _parse_counts(entries: object, path: Path) -> dict[UsageKey, float]:
    counts: dict[UsageKey, float] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        match entry:
            case [*key, int() | float() as value] if (
                key and all(type(n) is int for n in key) and 0 <= value < float("inf")
            ):
                counts[tuple(key)] = value
            case _:
                raise DataError(
                    f"{path} holds {entry!r} where a section and its uses should be; give another file"
                )
    return counts
