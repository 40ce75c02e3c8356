"""Bytes in tiers: sections of files, fixed slots in memory, reads in flight, and what is kept when slots run out.

Knows nothing of models or routing: a section is bytes with a name, a slot is memory that holds one of them.
"""

from moesys.store.cache import CacheStats, SectionCache
from moesys.store.memory import allocate_weight
from moesys.store.policy import HitCounts, LeastFrequent, LeastRecent, MayLeave, Policy
from moesys.store.reader import Read, SectionReader, Urgency
from moesys.store.section import Extent, Section
from moesys.store.slots import PartShape, SlotPool
from moesys.store.stored_file import StoredFile

__all__ = [
    "CacheStats",
    "Extent",
    "HitCounts",
    "LeastFrequent",
    "LeastRecent",
    "MayLeave",
    "PartShape",
    "Policy",
    "Read",
    "Section",
    "SectionCache",
    "SectionReader",
    "SlotPool",
    "StoredFile",
    "Urgency",
    "allocate_weight",
]
