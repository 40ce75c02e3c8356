"""Bytes in tiers: sections of files, fixed slots in memory, reads in flight, and what is kept when slots run out.

Knows nothing of models or routing: a section is bytes with a name, a slot is memory that holds one of them.
"""

from moesys.store.cache import CacheMemory, CacheStats, SectionCache
from moesys.store.checksums import ChecksumRecord
from moesys.store.events import ReadEvent, Urgency, Verification
from moesys.store.memory import allocate_weight
from moesys.store.open_files import ReadMode, find_direct_obstacle
from moesys.store.policy import (
    FadingCounts,
    HitCounts,
    LeastFrequent,
    LeastRecent,
    MayLeave,
    Policy,
    PolicyName,
    make_policy,
)
from moesys.store.reader import Read, SectionReader
from moesys.store.replay import ReplayResult, replay, replay_best
from moesys.store.ring import Ring
from moesys.store.section import Extent, Section
from moesys.store.slots import PartShape, SlotPool
from moesys.store.stored_file import StoredFile
from moesys.store.tier import Arrival, HostTier, Mover, Slots, Tier
from moesys.store.usage import UsageProfile, preload

__all__ = [
    "Arrival",
    "CacheMemory",
    "CacheStats",
    "ChecksumRecord",
    "Extent",
    "FadingCounts",
    "HitCounts",
    "HostTier",
    "LeastFrequent",
    "LeastRecent",
    "MayLeave",
    "Mover",
    "PartShape",
    "Policy",
    "PolicyName",
    "Read",
    "ReadEvent",
    "ReadMode",
    "ReplayResult",
    "Ring",
    "Section",
    "SectionCache",
    "SectionReader",
    "SlotPool",
    "Slots",
    "StoredFile",
    "Tier",
    "Urgency",
    "UsageProfile",
    "Verification",
    "allocate_weight",
    "find_direct_obstacle",
    "make_policy",
    "preload",
    "replay",
    "replay_best",
]
