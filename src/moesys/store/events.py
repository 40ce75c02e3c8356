"""What a reader tells of each section it read: when, how much, for whom. For traces; nothing is decided here.

Times are `time.perf_counter` seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum


class Urgency(IntEnum):
    """What is read first."""

    DEMAND = 0
    """Somebody waits for it."""
    PREFETCH = 1
    """A guess: only when nothing is demanded."""


class Verification(Enum):
    """What is known of the bytes of a section that was read."""

    COMPARED = "compared"
    """They have the checksums that were known before."""
    RECORDED = "recorded"
    """Nobody knew their checksums; later reads are compared with these bytes."""
    SKIPPED = "skipped"
    """The reader does not verify."""


@dataclass(frozen=True)
class ReadEvent:
    """A section whose read has ended.

    section:     its name.
    queued_s:    when it was asked for.
    started_s:   when a thread took its first piece; the end where none did, since the reader was closed.
    finished_s:  when its last byte was there and verified, or it had failed.
    urgency:     at the end: a guess that was hurried is a demand.
    """

    section: str
    num_bytes: int
    queued_s: float
    started_s: float
    finished_s: float
    urgency: Urgency
    failed: bool
