"""What a run read from the disk, and how that compares with the least it could have read: pure arithmetic.

policy share:    loads of a cache that knew the future (Belady) ÷ all loads, those that nobody used included.
transfer share:  seconds that the loads that were used take at the disk's rate ÷ the seconds of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moesys.store import HitCounts, LeastFrequent, LeastRecent
from moesys.store.replay import replay, replay_best


@dataclass(frozen=True)
class Traffic:
    """Counts of a stretch of a run.

    num_demands:  experts that were needed, once per layer and step.
    num_loads:    experts read, whether used or not.
    used_bytes:   read and then used.
    num_best:     loads of a cache that knew the future, from the same contents on.
    num_replayed: loads of other policies, by name, likewise.
    """

    num_demands: int
    num_loads: int
    loaded_bytes: int
    used_bytes: int
    num_best: int
    num_replayed: Mapping[str, int]

    @property
    def policy_share(self) -> float:
        """1 where nothing was read."""
        return self.num_best / self.num_loads if self.num_loads else 1.0

    def compute_transfer_share(self, disk_rate: float, seconds: float) -> float:
        """disk_rate: bytes per second."""
        return self.used_bytes / disk_rate / seconds

    @property
    def record(self) -> dict[str, Any]:
        return {**asdict(self), "policy_share": self.policy_share}


def count_best_loads(
    demands: Iterable[Collection[Hashable]], num_slots: int, start: Collection[Hashable]
) -> int:
    """Returns the fewest loads that serve the demands, from a cache that holds ``start``."""
    return replay_best([tuple(start), *demands] if start else demands, num_slots).num_loads - len(start)


def count_replayed_loads(
    demands: Collection[Collection[Hashable]], num_slots: int, start: Collection[Hashable]
) -> dict[str, int]:
    """Returns the loads of policies that do not know the future, by name, from a cache that holds ``start``."""
    policies = {"lru": LeastRecent(), "lfu": LeastFrequent(), "hits": HitCounts()}
    groups = [tuple(start), *demands] if start else list(demands)
    return {
        name: replay(groups, policy, num_slots).num_loads - len(start) for name, policy in policies.items()
    }


def find_bound(disk_seconds: float, memory_seconds: float) -> str:
    """Returns which of a step's two terms is the longer one, ``disk`` or ``memory``."""
    return "disk" if disk_seconds > memory_seconds else "memory"
