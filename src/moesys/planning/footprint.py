"""What a model needs in memory, in bytes: what every token uses, its experts as sections, and its KV cache.

Plain numbers; knows nothing of files, tiers or budgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moesys.models import MixerConfig

PAGE_TOKENS = 64
"""Tokens whose keys and values are kept together."""


@dataclass(frozen=True)
class Footprint:
    """A model in memory.

    core_bytes:           weights that every token uses: all but the experts.
    section_bytes:        of one expert, for every expert of every MoE layer.
    kv_bytes_per_token:   of one sequence's cache.
    state_bytes:          of one sequence, whatever its length.
    """

    core_bytes: int
    section_bytes: tuple[int, ...]
    kv_bytes_per_token: int
    state_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        return self.core_bytes + sum(self.section_bytes)

    @property
    def num_shapes(self) -> int:
        """Of experts, told apart by their sizes. Each shape has slots of its own."""
        return len(set(self.section_bytes))

    @property
    def slot_bytes(self) -> int:
        """Of a slot that holds any of the experts; 0 without experts."""
        return max(self.section_bytes, default=0)


def compute_kv_bytes_per_token(mixers: Sequence[MixerConfig], itemsize: int) -> int:
    """Returns what one token of context takes in the cache of one sequence.

    A window does not shrink it: the cache keeps every key and value, and attention skips those that are too far back.
    """
    return itemsize * sum(tensor.num_heads * tensor.size for mixer in mixers for tensor in mixer.cached)


def compute_state_bytes(mixers: Sequence[MixerConfig]) -> int:
    """Returns what the mixers keep of one sequence in float32, whatever its length."""
    return 4 * sum(math.prod(shape) for mixer in mixers for shape in mixer.state_shapes)


def round_to_pages(num_tokens: int) -> int:
    """Returns for how many tokens a sequence of ``num_tokens`` has room in the cache, which grows by whole pages."""
    return -(-num_tokens // PAGE_TOKENS) * PAGE_TOKENS
