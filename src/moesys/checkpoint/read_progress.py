"""How much has been read of what is to be read, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class ReadProgress:
    """Counts bytes as they come.

    on_progress:  gets (bytes read, bytes to read) after each `add`.
    """

    total_bytes: int
    on_progress: Callable[[int, int], None]
    read_bytes: int = 0

    def add(self, num_bytes: int) -> None:
        """Notes that so many more bytes have been read."""
        self.read_bytes += num_bytes
        self.on_progress(self.read_bytes, self.total_bytes)
