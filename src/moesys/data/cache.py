"""Folders whose names tell their content, built once.

An entry is written beside its place, synced to the disk and moved there in one step: a reader sees all of it or
nothing, also after a power cut, and several ranks may build the same one at once. Knows nothing of what an entry holds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moesys.errors import DataError

Entry = TypeVar("Entry")

_logger = logging.getLogger(__name__)


def open_or_build(folder: Path, open_entry: Callable[[Path], Entry], build: Callable[[Path], None]) -> Entry:
    """Opens a cache entry; a missing one is built first, a damaged one is rebuilt with a warning on the log.

    Args:
        folder: where the entry lies.
        open_entry: reads it, and raises `DataError` when it is damaged.
        build: writes it into the empty folder that it is given; plain files only.

    Raises:
        DataError: the cache cannot be written; names the folder and the cause.
    """
    if folder.exists():
        try:
            return open_entry(folder)
        except DataError as error:
            _logger.warning("the cache entry is built again: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
    try:
        _build_beside(folder, build)
    except OSError as error:
        raise DataError(
            f"the cache entry {folder} cannot be written ({error.strerror or error}); "
            "free some space, or set MOESYS_CACHE to a folder that this user may write"
        ) from error
    return open_entry(folder)


def hash_parts(*parts: object) -> str:
    """Returns a SHA-256 over the parts in order, hexadecimal."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


def _build_beside(folder: Path, build: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as temporary:
        built = Path(temporary) / folder.name
        built.mkdir()
        build(built)
        for path in (*built.iterdir(), built):
            _sync(path)
        try:
            os.rename(built, folder)
        except OSError:
            if not folder.exists():
                raise
        _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
