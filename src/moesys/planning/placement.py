"""What of a model fits where: a pure function of its footprint and the budgets of the tiers, the fastest first.

What every token uses goes first, and wholly into the first tier, with the KV cache and what a step computes. Experts
fill what is left of each tier, as slots of one size, in no particular order: which of them are worth keeping is known
only when tokens are routed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesys.planning.budget import Budget
from moesys.planning.footprint import Footprint

RESERVE_BYTES = 256 * 2**20
"""What a tier with a size needs besides weights and KV cache: staging, activations, libraries."""

RESERVE_SHARE = 0.02
"""Of the weights held, on top: what allocating them in pieces may waste."""


@dataclass(frozen=True)
class TierPlacement:
    """What one tier holds, in bytes.

    kv_bytes, reserve_bytes, step_bytes:  within the budget where it is a size, beside it where it is a share.
    missing_bytes:                        by how much the tier is too small for what it has to hold; 0 where it is not.
    step_bytes:                           for what a step computes.
    """

    budget: Budget
    core_bytes: int
    num_experts: int
    expert_bytes: int
    kv_bytes: int
    reserve_bytes: int
    missing_bytes: int
    step_bytes: int = 0

    @property
    def used_bytes(self) -> int:
        return self.core_bytes + self.expert_bytes + self.kv_bytes + self.reserve_bytes + self.step_bytes


@dataclass(frozen=True)
class Placement:
    """Where a model would lie, for a KV cache of ``context_tokens`` tokens."""

    tiers: tuple[TierPlacement, ...]
    context_tokens: int
    num_experts_on_disk: int
    disk_bytes: int

    @property
    def missing_bytes(self) -> int:
        """By how much the first tier is too small for what every token uses."""
        return self.tiers[0].missing_bytes

    @property
    def is_resident(self) -> bool:
        """Whether the first tier holds all of it, so that nothing ever moves."""
        return (
            not self.missing_bytes and not self.disk_bytes and not any(t.num_experts for t in self.tiers[1:])
        )


def place(
    footprint: Footprint,
    budgets: Sequence[Budget],
    context_tokens: int,
    step_bytes: int = 0,
    num_sequences: int = 1,
) -> Placement:
    """Returns what fits where. ``budgets`` are those of the tiers, the one that computes first.

    context_tokens:  for which the KV cache has room, of all ``num_sequences``.
    step_bytes:      what computing a step takes, besides weights, keys and values.
    """
    sections = sorted(footprint.section_bytes)
    kv_bytes = footprint.kv_bytes_per_token * context_tokens + footprint.state_bytes * num_sequences
    tiers = []
    for i, budget in enumerate(budgets):
        core, kv, step = (footprint.core_bytes, kv_bytes, step_bytes) if i == 0 else (0, 0, 0)
        room = _compute_room(budget, kv + step) - core
        num_experts = _count_fitting(sections, room)
        expert_bytes = _count_slot_bytes(sections, num_experts)
        sections = sections[num_experts:]
        held = core + expert_bytes
        reserve = compute_reserve(held) if held else 0
        tiers.append(
            TierPlacement(
                budget, core, num_experts, expert_bytes, kv, reserve, max(0, -room) if core else 0, step
            )
        )
    return Placement(tuple(tiers), context_tokens, len(sections), sum(sections))


def compute_reserve(held_bytes: int) -> int:
    """Returns what a tier with a size needs besides weights of ``held_bytes``, KV cache and steps."""
    return RESERVE_BYTES + round(RESERVE_SHARE * held_bytes)


def _compute_room(budget: Budget, other_bytes: int) -> int:
    """Returns the bytes of weights that a budget leaves room for; negative where the rest alone is too much."""
    if budget.is_share:
        return budget.size_bytes
    return int((budget.size_bytes - other_bytes - RESERVE_BYTES) / (1 + RESERVE_SHARE))


def _count_fitting(sections: Sequence[int], room: int) -> int:
    """Returns how many of the sections, which ascend, fit: all as they are, or as slots of the largest one's size."""
    if not sections or room >= sum(sections):
        return len(sections)
    return max(0, room // sections[-1])


def _count_slot_bytes(sections: Sequence[int], num_fitting: int) -> int:
    if num_fitting == len(sections):
        return sum(sections)
    return num_fitting * sections[-1]
