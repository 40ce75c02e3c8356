"""Tiers of memory behind one interface: how much each may hold, where its slots lie, how a section gets into them.

The idea: a cache moves sections into slots and asks no more of a tier than `Slots` and `Mover`. The disk is a tier
without slots, where sections lie as extents: of it only the bytes are counted. Host slots are memory of this process
(`SlotPool`), filled by the threads of a `SectionReader`. A device has slots and a mover of its own.

A mover for a GPU needs nothing besides these interfaces. Its places are slices of device tensors. It reads a section
into a pinned host slot, then copies it on a copy stream of its own and records an event behind the copy; `is_done` asks
the event, `wait_any` waits for the first of several. Two orders must hold, and both are the mover's: `submit` lets the
copy stream wait for an event recorded at that moment on the compute stream, since kernels that read the slot's last
section may still run when the cache has let go of it; and the compute stream needs no wait of its own, as the cache
gives out a slot only after `is_done`.

Knows sizes and names; knows nothing of models or of who decides what leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, TypeVar

from moesys.errors import SectionReadError, ShapeError
from moesys.store.events import Urgency, Verification
from moesys.store.reader import SectionReader
from moesys.store.section import Section
from moesys.store.slots import PartShape, SlotPool
from moesys.units import format_bytes

Place = TypeVar("Place")
"""The bytes of one extent in a slot, as a tier's mover takes them: a `memoryview` on the host."""


class Arrival(Protocol):
    """A section on its way to a slot.

    error, verification: hold once it is done.
    """

    @property
    def is_done(self) -> bool: ...
    @property
    def error(self) -> SectionReadError | None: ...
    @property
    def verification(self) -> Verification: ...


Moved = TypeVar("Moved", bound=Arrival)


class Slots(Protocol[Place]):
    """Fixed memory of a tier, in places for one section each."""

    @property
    def num_slots(self) -> int: ...
    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        ...

    def open_part(self, slot: int, part: int, offset: int, num_bytes: int) -> Place:
        """Returns where bytes of a part of a slot go."""
        ...


class Mover(Protocol[Place, Moved]):
    """Fills slots. Calls come from one thread; bytes may arrive by others, and in any order."""

    def require_open(self) -> None:
        """Raises `SectionReadError` when it fills no more."""
        ...

    def submit(self, section: Section, places: Sequence[Place], urgency: Urgency, /) -> Moved:
        """Starts to bring a section, one place for each of its extents; nobody touches them until it is done."""
        ...

    def hurry(self, arrival: Moved, /) -> None:
        """Makes a guess a demand."""
        ...

    def wait_any(self, arrivals: Sequence[Moved], /) -> None:
        """Waits until at least one of them is done."""
        ...


class Tier:
    """The bytes of one tier: what it can hold and what was promised of it, to the byte."""

    def __init__(self, name: str, capacity_bytes: int | None = None) -> None:
        """
        name:            for messages, such as ``host``.
        capacity_bytes:  None where nothing bounds it; it is counted all the same.

        Raises `ShapeError` for a capacity below 0.
        """
        if capacity_bytes is not None and capacity_bytes < 0:
            raise ShapeError(f"the {name} tier's capacity ({capacity_bytes} bytes) must not be below 0")
        self.name = name
        self.capacity_bytes = capacity_bytes
        self._reserved: dict[str, int] = {}

    @property
    def reserved(self) -> Mapping[str, int]:
        """Bytes by what they are for, in the order in which they were asked for."""
        return MappingProxyType(self._reserved)

    @property
    def reserved_bytes(self) -> int:
        return sum(self._reserved.values())

    @property
    def free_bytes(self) -> int | None:
        """What is left; None where nothing bounds the tier."""
        return None if self.capacity_bytes is None else self.capacity_bytes - self.reserved_bytes

    def reserve(self, name: str, num_bytes: int) -> None:
        """Promises bytes, in addition to what the same name has. Raises `ShapeError`, with the sum, when they are more
        than the tier has left."""
        if num_bytes < 0:
            raise ShapeError(f"{name} ({num_bytes} bytes) must not be below 0; give bytes back with release")
        total = self.reserved_bytes + num_bytes
        if self.capacity_bytes is not None and total > self.capacity_bytes:
            parts = "".join(f" + {held} {size}" for held, size in self._reserved.items())
            raise ShapeError(
                f"{name} {num_bytes}{parts} = {total} bytes is more than the {self.capacity_bytes} of the {self.name} "
                f"tier, by {format_bytes(total - self.capacity_bytes)}; raise its budget or hold less"
            )
        self._reserved[name] = self._reserved.get(name, 0) + num_bytes

    def release(self, name: str) -> None:
        """Gives back all that a name holds. Raises `ShapeError` for a name that holds nothing."""
        if name not in self._reserved:
            raise ShapeError(f"{name} holds nothing of the {self.name} tier; it has {sorted(self._reserved)}")
        del self._reserved[name]


class HostTier(Tier):
    """Memory of this process, filled from the disk."""

    def __init__(self, reader: SectionReader, capacity_bytes: int | None = None, name: str = "host") -> None:
        """Reserves the reader's own buffers. Raises `ShapeError` as `Tier` does."""
        super().__init__(name, capacity_bytes)
        self.reader = reader
        self.reserve("staging", reader.staging_bytes)

    @property
    def used_bytes(self) -> int:
        """What is reserved, and what the system's page cache may hold for us besides: together, the budget's."""
        return self.reserved_bytes + self.reader.page_cache_bytes

    def allocate_slots(self, name: str, num_slots: int, shapes: Sequence[PartShape]) -> SlotPool:
        """Reserves and allocates slots. Raises `ShapeError`, before anything is allocated, when they do not fit."""
        slot_bytes = sum(shape.num_bytes for shape in shapes)
        self.reserve(name, num_slots * slot_bytes)
        return SlotPool(num_slots, shapes)
