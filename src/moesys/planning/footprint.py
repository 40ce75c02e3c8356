"""What a model needs in memory, in bytes: what every token uses, its experts as sections, and its KV cache.

Plain numbers; knows nothing of files, tiers or budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesys.models import MixerConfig


@dataclass(frozen=True)
class Footprint:
    """A model in memory.

    core_bytes:           weights that every token uses: all but the experts.
    section_bytes:        of one expert, for every expert of every MoE layer.
    kv_bytes_per_token:   of one sequence's cache.
    """

    core_bytes: int
    section_bytes: tuple[int, ...]
    kv_bytes_per_token: int

    @property
    def weight_bytes(self) -> int:
        return self.core_bytes + sum(self.section_bytes)

    @property
    def slot_bytes(self) -> int:
        """Of a slot that holds any of the experts; 0 without experts."""
        return max(self.section_bytes, default=0)


def compute_kv_bytes_per_token(mixers: Sequence[MixerConfig], itemsize: int) -> int:
    """Returns what one token of context takes in the cache of one sequence.

    A window does not shrink it: the cache keeps every key and value, and attention skips those that are too far back.
    """
    return sum(mixer.num_kv_heads * (mixer.key_dim + mixer.value_dim) * itemsize for mixer in mixers)
