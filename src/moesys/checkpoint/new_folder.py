"""A folder that appears whole or not at all: it is filled under another name and renamed when it is on the disk."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesys.checkpoint.files import DEFAULT, FileSystem
from moesys.errors import CheckpointError, ConfigError


def require_new_folder(target: Path) -> None:
    """Raises `ConfigError` for a target that exists and is not an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; give another one with --to")


@contextmanager
def write_new_folder(target: Path, files: FileSystem = DEFAULT) -> Iterator[Path]:
    """Gives a folder to fill, which is renamed to ``target`` when nothing was raised inside, and removed otherwise.

    Raises what `require_new_folder` raises, and `CheckpointError` where the system refuses.
    """
    target = target.resolve()
    require_new_folder(target)
    draft = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        yield draft
        files.fsync_directory(draft)
        if target.exists():
            target.rmdir()
        draft.rename(target)
        files.fsync_directory(target.parent)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
