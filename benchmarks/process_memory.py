"""How much memory of its own this process holds, and how much it read from the disk, as the system counts it."""

from __future__ import annotations

import threading
from pathlib import Path

_OWN = ("RssAnon:", "RssShmem:")


def read_own_bytes() -> int:
    """Returns resident memory that is not a mapped file's: anonymous and shared. Pages of files are the system's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_OWN))


def read_disk_bytes() -> int:
    """Returns the bytes that the disk was asked for on behalf of this process since it began."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


class PeakOwnMemory:
    """The high-water mark of `read_own_bytes` above what it was when this was made.

    The system keeps no such mark, so a thread looks, by default a hundred times a second: often enough for slots and
    activations, rarely enough to take no time from what is measured.
    """

    def __init__(self, interval_s: float = 0.01) -> None:
        self._interval_s = interval_s
        self.idle_bytes = self._peak_bytes = read_own_bytes()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def stop(self) -> int:
        """Returns the peak in bytes and ends the watching."""
        self._stop.set()
        self._watcher.join()
        self._look()
        return self._peak_bytes - self.idle_bytes

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        self._peak_bytes = max(self._peak_bytes, read_own_bytes())
