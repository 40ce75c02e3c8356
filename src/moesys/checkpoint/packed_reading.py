"""Sections of a packed file read into memory that is there, several at a time, each compared with its checksums.

Knows sections and buffers; knows nothing of what they hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moesys.store import Read, Section, SectionReader, Urgency

_NUM_IN_FLIGHT = 8
"""Enough for several readers, few enough to follow the file."""


@dataclass(frozen=True)
class ReadJob:
    """A section, the memory that each of its extents goes to, and what is called once they are there."""

    section: Section
    buffers: tuple[memoryview, ...]
    on_read: Callable[[], None] = lambda: None


def read_sections(jobs: Iterable[ReadJob], on_progress: Callable[[int], None]) -> None:
    """Does the jobs in their order, asking for the next only when there is room for it.

    ``on_progress`` gets the bytes of each that is done. Raises `SectionReadError` for bytes that cannot be read or that
    differ from their checksum, twice.
    """
    in_flight: deque[tuple[ReadJob, Read]] = deque()
    with SectionReader(keeps_pages=True) as reader:

        def finish_oldest() -> None:
            job, read = in_flight.popleft()
            reader.wait_any([read])
            if read.error is not None:
                raise read.error
            job.on_read()
            on_progress(job.section.num_bytes)

        for job in jobs:
            if len(in_flight) == _NUM_IN_FLIGHT:
                finish_oldest()
            in_flight.append((job, reader.submit(job.section, job.buffers, Urgency.DEMAND)))
        while in_flight:
            finish_oldest()
