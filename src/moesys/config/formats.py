"""Which endings of file names mean records with fields; every other file is one plain text. Knows no reader."""

from __future__ import annotations

from pathlib import PurePath

RECORD_SUFFIXES = {"jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",)}
"""Endings of each format that has fields, in lower case."""


def has_fields(file: PurePath) -> bool:
    """Returns whether a file is read as records with fields where the format goes by its ending."""
    return any(file.suffix.lower() in suffixes for suffixes in RECORD_SUFFIXES.values())
