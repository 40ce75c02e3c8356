"""What fits where: by hand for small numbers, by its laws for any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.planning import Budget, Footprint, place
from moesys.planning.placement import RESERVE_BYTES, RESERVE_SHARE

MIB = 2**20
GIB = 2**30


def make_footprint(num_experts: int = 8) -> Footprint:
    return Footprint(core_bytes=GIB, section_bytes=(100 * MIB,) * num_experts, kv_bytes_per_token=MIB)


def test_all_of_it_fits() -> None:
    placement = place(make_footprint(), [Budget("RAM", 4 * GIB)], context_tokens=100)
    (tier,) = placement.tiers
    assert placement.is_resident
    assert (tier.num_experts, tier.expert_bytes, tier.core_bytes) == (8, 800 * MIB, GIB)
    assert (tier.kv_bytes, placement.num_experts_on_disk, placement.missing_bytes) == (100 * MIB, 0, 0)


def test_experts_that_do_not_fit_lie_on_the_disk() -> None:
    room = GIB + 399 * MIB
    size = int(room * (1 + RESERVE_SHARE)) + RESERVE_BYTES + 100 * MIB + 1
    placement = place(make_footprint(), [Budget("RAM", size)], context_tokens=100)
    assert not placement.is_resident
    assert placement.tiers[0].num_experts == 3
    assert (placement.num_experts_on_disk, placement.disk_bytes) == (5, 500 * MIB)


def test_what_every_token_uses_must_fit() -> None:
    placement = place(make_footprint(), [Budget("RAM", GIB)], context_tokens=0)
    assert placement.missing_bytes > 0
    assert placement.tiers[0].num_experts == 0
    enough = GIB + int(placement.missing_bytes * (1 + RESERVE_SHARE)) + 2
    assert place(make_footprint(), [Budget("RAM", enough)], context_tokens=0).missing_bytes == 0


def test_a_share_bounds_weights_only() -> None:
    placement = place(make_footprint(), [Budget("RAM", GIB + 250 * MIB, is_share=True)], context_tokens=10**6)
    (tier,) = placement.tiers
    assert tier.num_experts == 2
    assert tier.core_bytes + tier.expert_bytes <= tier.budget.size_bytes < tier.used_bytes


def test_what_a_step_computes_takes_room_of_the_first_tier() -> None:
    budgets = [Budget("GPU memory", 2 * GIB), Budget("RAM", 2 * GIB)]
    without, with_step = (place(make_footprint(20), budgets, 100, step_bytes=n) for n in (0, 250 * MIB))
    first, second = with_step.tiers
    assert (first.step_bytes, second.step_bytes) == (250 * MIB, 0)
    assert first.used_bytes <= 2 * GIB
    assert without.tiers[0].num_experts - first.num_experts == pytest.approx(250 / 102, abs=1)
    assert place(make_footprint(), [Budget("RAM", GIB)], 0, GIB).missing_bytes > GIB


def test_every_sequence_has_a_state() -> None:
    footprint = Footprint(GIB, (MIB,), MIB, state_bytes=7)
    (tier,) = place(footprint, [Budget("RAM", 4 * GIB)], 10, num_sequences=3).tiers
    assert tier.kv_bytes == 10 * MIB + 21


def test_the_next_tier_takes_what_the_first_cannot() -> None:
    first = Budget("GPU memory", GIB + 250 * MIB, is_share=True)
    second = Budget("RAM", 350 * MIB, is_share=True)
    placement = place(make_footprint(), [first, second], context_tokens=1)
    assert [tier.num_experts for tier in placement.tiers] == [2, 3]
    assert placement.num_experts_on_disk == 3
    assert placement.tiers[1].core_bytes == placement.tiers[1].kv_bytes == 0
    all_in_two = place(make_footprint(), [first, Budget("RAM", 10 * GIB)], context_tokens=1)
    assert (all_in_two.num_experts_on_disk, all_in_two.is_resident) == (0, False)


def test_slots_are_of_one_size_unless_all_fit() -> None:
    footprint = Footprint(0, (10, 10, 100), 0)
    some, every = (place(footprint, [Budget("RAM", size, is_share=True)], 1).tiers[0] for size in (119, 120))
    assert (some.num_experts, some.expert_bytes) == (1, 100)
    assert (every.num_experts, every.expert_bytes) == (3, 120)


def test_a_tier_that_holds_nothing_needs_no_reserve() -> None:
    placement = place(Footprint(GIB, (), 0), [Budget("GPU memory", 4 * GIB), Budget("RAM", GIB)], 1)
    assert placement.tiers[1].used_bytes == 0


BUDGETS = st.builds(Budget, st.just("tier"), st.integers(1, 4 * GIB), st.booleans())


@given(
    st.builds(
        Footprint,
        st.integers(0, 2 * GIB),
        st.lists(st.integers(1, GIB), max_size=12).map(tuple),
        st.integers(0, MIB),
    ),
    st.lists(BUDGETS, min_size=1, max_size=2),
    st.integers(1, 4096),
    st.integers(0, GIB),
)
def test_no_budget_is_exceeded_and_no_expert_is_lost(
    footprint: Footprint, budgets: list[Budget], context_tokens: int, step_bytes: int
) -> None:
    placement = place(footprint, budgets, context_tokens, step_bytes)
    num_kept = sum(tier.num_experts for tier in placement.tiers)
    assert num_kept + placement.num_experts_on_disk == len(footprint.section_bytes)
    for tier in placement.tiers:
        bounded = tier.core_bytes + tier.expert_bytes if tier.budget.is_share else tier.used_bytes
        if tier.missing_bytes:
            assert tier.num_experts == 0
        elif tier.core_bytes or tier.num_experts:
            assert bounded <= tier.budget.size_bytes + 1


def test_no_kv_cache_is_too_large_to_be_told() -> None:
    placement = place(make_footprint(), [Budget("RAM", 4 * GIB)], context_tokens=10**6)
    assert placement.missing_bytes == pytest.approx(10**6 * MIB, rel=0.05)
