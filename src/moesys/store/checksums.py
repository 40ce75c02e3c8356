"""Checksums of files that carry none: taken at the first read, compared at every later one, kept between runs.

One JSON file beside other caches per file of weights, which names the file as it was; of one that was replaced or
written since, nothing is believed. Knows extents; knows nothing of threads or retries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesys import env
from moesys.store.section import Extent
from moesys.store.stored_file import StoredFile

_VERSION = 1


@dataclass
class _FileRecord:
    """Of one file, by (offset, bytes) of an extent. doubtful: noted in this run, and contradicted since."""

    kept: dict[tuple[int, int], int]
    noted: dict[tuple[int, int], int] = field(default_factory=dict)
    doubtful: set[tuple[int, int]] = field(default_factory=set)


class ChecksumRecord:
    """CRC-32s by file, offset and size. May be used from several threads."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: where it is loaded from and saved to; None to forget it with the process."""
        self._folder = folder
        self._files: dict[StoredFile, _FileRecord] = {}
        self._lock = threading.Lock()

    @classmethod
    def open_default(cls) -> ChecksumRecord:
        """Returns the record of this user, in the folder of caches (``MOESYS_CACHE``)."""
        return cls(env.read_cache_dir() / "checksums")

    def find(self, extent: Extent) -> int | None:
        """Returns what was noted for these bytes, in this run or an earlier one; None where nothing was."""
        key = (extent.offset, extent.num_bytes)
        with self._lock:
            record = self._open(extent.file)
            return record.kept.get(key, record.noted.get(key))

    def note(self, extent: Extent, checksum: int) -> int:
        """Remembers the checksum of bytes read for the first time, and returns the one to compare with: an older one
        where there is one."""
        key = (extent.offset, extent.num_bytes)
        with self._lock:
            record = self._open(extent.file)
            return record.kept[key] if key in record.kept else record.noted.setdefault(key, checksum)

    def doubt(self, extent: Extent) -> Path | None:
        """Says that the disk has contradicted what was noted, again and again.

        What this run noted holds until it ends and is not saved: perhaps the first read was wrong. Returns the record's
        file where an earlier run noted it.
        """
        key = (extent.offset, extent.num_bytes)
        with self._lock:
            record = self._open(extent.file)
            if key in record.noted:
                record.doubtful.add(key)
                return None
            return self._locate(extent.file)

    def save(self) -> None:
        """Writes what this run added, each file at once or not at all. A folder that cannot be written is only logged:
        the next run then notes anew."""
        with self._lock:
            for file, record in self._files.items():
                added = {key: crc for key, crc in record.noted.items() if key not in record.doubtful}
                path = self._locate(file)
                if path is None or not added:
                    continue
                try:
                    _write(path, file, _load(path, file) | record.kept | added)
                except OSError as error:
                    logging.getLogger("moesys").warning(
                        "checksums of %s are not kept: %s cannot be written: %s", file.path, path, error
                    )

    def _open(self, file: StoredFile) -> _FileRecord:
        if file not in self._files:
            path = self._locate(file)
            self._files[file] = _FileRecord({} if path is None else _load(path, file))
        return self._files[file]

    def _locate(self, file: StoredFile) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{hashlib.sha256(os.fsencode(file.path)).hexdigest()[:32]}.json"


def _describe(file: StoredFile) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "path": str(file.path),
        "inode": file.inode,
        "num_bytes": file.num_bytes,
        "modified_ns": file.modified_ns,
    }


def _load(path: Path, file: StoredFile) -> dict[tuple[int, int], int]:
    """Returns what is recorded of a file; nothing where the record is of another one, or is none."""
    try:
        record = json.loads(path.read_bytes())
        if any(record[key] != value for key, value in _describe(file).items()):
            return {}
        return {(int(offset), int(size)): int(checksum) for offset, size, checksum in record["extents"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logging.getLogger("moesys").warning(
            "the checksums in %s cannot be read (%s: %s) and are recorded anew",
            path,
            type(error).__name__,
            error,
        )
        return {}


def _write(path: Path, file: StoredFile, checksums: dict[tuple[int, int], int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = _describe(file) | {"extents": [[*key, checksum] for key, checksum in sorted(checksums.items())]}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(record))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
