"""What moves between tiers: a named group of bytes, and where on the disk they lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moesys.errors import ShapeError
from moesys.store.stored_file import StoredFile


@dataclass(frozen=True)
class Extent:
    """Bytes of a file and their place in a slot.

    part, part_offset:  which of the slot's parts they go to, and from which byte of it on.
    """

    file: StoredFile
    offset: int
    num_bytes: int
    part: int
    part_offset: int = 0


@dataclass(frozen=True)
class Section:
    """A group of extents that is read together: one expert, for example.

    checksums:  the CRC-32 of each extent, as `zlib.crc32` computes it; None where nobody has recorded them yet.

    Raises `ShapeError` for no extents, an extent without bytes, or another number of checksums.
    """

    name: str
    extents: tuple[Extent, ...]
    checksums: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.extents:
            raise ShapeError(f"section {self.name} has no extents; give it at least one")
        for extent in self.extents:
            if extent.num_bytes < 1:
                raise ShapeError(
                    f"section {self.name} has an extent of {extent.num_bytes} bytes; leave out what is empty"
                )
        if self.checksums is not None and len(self.checksums) != len(self.extents):
            raise ShapeError(
                f"section {self.name} has {len(self.checksums)} checksums for {len(self.extents)} extents; "
                "give one for each, or None"
            )

    @cached_property
    def num_bytes(self) -> int:
        return sum(extent.num_bytes for extent in self.extents)
