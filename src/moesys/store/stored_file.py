"""A file as it was when its contents were looked at, so that one put in its place later is noticed.

Knows paths and the operating system; knows nothing of what a file holds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StoredFile:
    """Where a file lies and which one it is.

    path:         absolute.
    modified_ns:  when it was last written, in nanoseconds since 1970.
    """

    path: Path
    device: int
    inode: int
    num_bytes: int
    modified_ns: int

    @classmethod
    def identify(cls, path: Path, descriptor: int) -> StoredFile:
        """Returns the file that is open as ``descriptor`` and was found at ``path``. Raises `OSError`."""
        status = os.fstat(descriptor)
        return cls(path.absolute(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def is_open_as(self, descriptor: int) -> bool:
        """Whether an open file is this one, unchanged. Raises `OSError`."""
        status = os.fstat(descriptor)
        found = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        return found == (self.device, self.inode, self.num_bytes, self.modified_ns)
