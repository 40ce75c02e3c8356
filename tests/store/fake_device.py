"""A device tier without a device: memory that the host cannot see, copies that take a while and end in any order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from moesys.errors import SectionReadError
from moesys.store import PartShape, Section, SectionReader, Urgency
from moesys.store.events import Verification
from moesys.store.tier import Tier


@dataclass(frozen=True)
class DevicePlace:
    """Bytes of the device: its only handle on the host."""

    memory: bytearray
    start: int
    stop: int


class DeviceSlots:
    def __init__(self, tier: Tier, num_slots: int, shapes: Sequence[PartShape]) -> None:
        self.num_slots = num_slots
        self.num_bytes = num_slots * sum(shape.num_bytes for shape in shapes)
        tier.reserve("slots", self.num_bytes)
        self._sizes = [shape.num_bytes for shape in shapes]
        self._parts = [bytearray(num_slots * size) for size in self._sizes]

    def open_part(self, slot: int, part: int, offset: int, num_bytes: int) -> DevicePlace:
        start = slot * self._sizes[part] + offset
        return DevicePlace(self._parts[part], start, start + num_bytes)

    def read_back(self, slot: int) -> list[bytes]:
        return [
            bytes(memory[slot * size : (slot + 1) * size])
            for memory, size in zip(self._parts, self._sizes, strict=True)
        ]


class Copy:
    """A section on its way: read into host memory first, then copied."""

    def __init__(self, section: Section, places: Sequence[DevicePlace]) -> None:
        self.section, self.places = section, places
        self.staging = [memoryview(bytearray(extent.num_bytes)) for extent in section.extents]
        self.is_done = False
        self.error: SectionReadError | None = None
        self.verification = Verification.SKIPPED


class DeviceMover:
    """One copy engine, which takes what waits in any order and is slow."""

    def __init__(self, reader: SectionReader, seed: int, delay_s: float = 0.001) -> None:
        self.order: list[str] = []
        self._reader, self._draw, self._delay_s = reader, random.Random(seed), delay_s
        self._changed = threading.Condition()
        self._waiting: list[tuple[Copy, Urgency]] = []
        self._is_closed = False
        self._engine = threading.Thread(target=self._serve, daemon=True)
        self._engine.start()

    def require_open(self) -> None:
        self._reader.require_open()

    def submit(self, section: Section, places: Sequence[DevicePlace], urgency: Urgency, /) -> Copy:
        self.require_open()
        for place in places:
            place.memory[place.start : place.stop] = b"\xee" * (place.stop - place.start)
        copy = Copy(section, places)
        with self._changed:
            self._waiting.append((copy, urgency))
            self._changed.notify_all()
        return copy

    def hurry(self, copy: Copy, /) -> None:
        with self._changed:
            self._waiting = [
                (other, Urgency.DEMAND if other is copy else old) for other, old in self._waiting
            ]

    def wait_any(self, copies: Sequence[Copy], /) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: any(copy.is_done for copy in copies), 10)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._engine.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._waiting)
                if not self._waiting:
                    return
                best = min(urgency for _, urgency in self._waiting)
                taken = self._draw.choice([pair for pair in self._waiting if pair[1] == best])
                self._waiting.remove(taken)
            copy = taken[0]
            read = self._reader.submit(copy.section, copy.staging, taken[1])
            self._reader.wait_any([read])
            time.sleep(self._draw.random() * self._delay_s)
            if read.error is None:
                for place, source in zip(copy.places, copy.staging, strict=True):
                    place.memory[place.start : place.stop] = source
            with self._changed:
                copy.error, copy.verification, copy.is_done = read.error, read.verification, True
                self.order.append(copy.section.name)
                self._changed.notify_all()
