"""What moves between tiers: a named group of bytes, and where on the disk they lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Extent:
    """Bytes of a file and their place in a slot.

    part, part_offset:  which of the slot's parts they go to, and from which byte of it on.
    """

    path: Path
    offset: int
    num_bytes: int
    part: int
    part_offset: int = 0


@dataclass(frozen=True)
class Section:
    """A group of extents that is read together: one expert, for example.

    checksums:  the CRC-32 of each extent, as `zlib.crc32` computes it; None where nobody has recorded them yet.
    """

    name: str
    extents: tuple[Extent, ...]
    checksums: tuple[int, ...] | None = None

    @cached_property
    def num_bytes(self) -> int:
        return sum(extent.num_bytes for extent in self.extents)
