"""How often an expert that a token needs is not in memory, by the number of slots: assumed, or counted in a log."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

SKEWED_SHARE = 0.4
"""Of the misses of uniform routing that real routing was seen to cause: with 13 % of the experts in memory 34 % of uses
missed (Qwen3-30B), with 12 to 25 % of 512 experts 33 to 19 %, under LRU."""


@dataclass(frozen=True)
class UniformMisses:
    """Every expert is needed as often as any other: then the share of misses is the share of experts that is not in
    memory, whichever they are.

    LRU hits so often when the slots hold the experts of m whole tokens, E (1 - (1 - k / E)^m) of each layer. With a few
    slots more it hits no more, for the layer that comes next is the one that was used longest ago; then up to k / E of
    the misses are misses besides.
    """

    num_experts: int

    is_assumed = True
    source = "uniform routing, assumed"

    def find_rate(self, num_slots: int) -> float:
        """Returns the share of uses that miss."""
        return max(0.0, 1 - num_slots / self.num_experts) if self.num_experts else 0.0


@dataclass(frozen=True)
class LoggedMisses:
    """What a log of demands causes under LRU, for every number of slots at once.

    depths:  ascending, of the uses that were no first ones: how many experts had been used since the last time when its
             group came, itself included (Mattson's stack distance). A use hits with at least as many slots.
    """

    source: str
    depths: Sequence[int]

    is_assumed = False

    def find_rate(self, num_slots: int) -> float:
        """Returns the share of uses that miss, first uses left out: slots are full by then in a long run."""
        if not self.depths:
            return 1.0
        return 1 - bisect.bisect_right(self.depths, num_slots) / len(self.depths)


MissRates = UniformMisses | LoggedMisses
"""The share of misses by the number of slots."""


def count_misses(demands: Iterable[Sequence[Hashable]], source: str) -> LoggedMisses:
    """Replays demands, one group of experts after the other, and returns the misses for every number of slots."""
    stack: list[Hashable] = []
    depths: Counter[int] = Counter()
    for demand in demands:
        places = [stack.index(key) for key in demand if key in stack]
        depths.update(len(stack) - place for place in places)
        for place in sorted(places, reverse=True):
            del stack[place]
        stack.extend(demand)
    return LoggedMisses(source, tuple(sorted(depths.elements())))
