"""Replays count what a cache reads, and Belady's rule reads least of all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from section_files import make_pool, write_sections

from moesys.errors import ShapeError
from moesys.store import HitCounts, LeastFrequent, LeastRecent, Policy, SectionCache, SectionReader
from moesys.store.policy import PolicyName, make_policy
from moesys.store.replay import ReplayResult, replay, replay_best

POLICIES: list[Callable[[], Policy]] = [
    LeastRecent,
    LeastFrequent,
    HitCounts,
    lambda: HitCounts(threshold=1, decay=0.5, period=3),
]
TRACES = st.lists(st.sets(st.integers(0, 9), max_size=6).map(sorted), max_size=40)
TINY = st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=4).map(sorted), max_size=7)


def search_best(groups: Sequence[Sequence[int]], num_slots: int) -> int:
    """Tries everything that may be left behind after each group."""
    costs = {frozenset[int](): 0}
    for group in groups:
        needed = frozenset(group)
        after: dict[frozenset[int], int] = {}
        for here, cost in costs.items():
            missing = needed - here
            for left in _list_left(here, needed, num_slots):
                total = cost + len(missing)
                after[left] = min(after.get(left, total), total)
        costs = after
    return min(costs.values())


def _list_left(here: frozenset[int], needed: frozenset[int], num_slots: int) -> list[frozenset[int]]:
    union, missing = here | needed, needed - here
    size = min(num_slots, len(union))
    left = map(frozenset, itertools.combinations(sorted(union), size))
    if len(needed) <= num_slots:
        return [kept for kept in left if needed <= kept]
    return [kept for kept in left if kept & missing]


@settings(max_examples=200, deadline=None)
@given(TINY, st.integers(1, 4))
def test_the_best_is_the_best_of_everything_that_could_be_done(
    groups: list[list[int]], num_slots: int
) -> None:
    assert replay_best(groups, num_slots).num_loads == search_best(groups, num_slots)


@settings(max_examples=200, deadline=None)
@given(TRACES, st.integers(1, 10))
def test_no_policy_beats_the_best_and_none_saves_first_loads(groups: list[list[int]], num_slots: int) -> None:
    best = replay_best(groups, num_slots)
    num_first = len({key for group in groups for key in group})
    for make in POLICIES:
        found = replay(groups, make(), num_slots)
        assert (found.num_demands, found.num_first) == (best.num_demands, best.num_first)
        assert found.num_demands == sum(map(len, groups))
        assert num_first == found.num_first <= best.num_loads <= found.num_loads <= found.num_demands
        if num_slots == 10:
            assert found.num_loads == num_first


def test_what_is_held_for_a_group_does_not_leave_for_it() -> None:
    groups = [[0, 1], [2, 3], [0, 2]]
    assert replay(groups, LeastRecent(), 3).num_loads == 5
    assert replay_best(groups, 3).num_loads == 4


def test_a_group_larger_than_the_cache_passes_in_turns() -> None:
    everything = list(range(6))
    found = replay([everything] * 3, LeastRecent(), 4)
    assert found == ReplayResult(4, num_demands=18, num_loads=6 + 2 + 2, num_first=6)
    assert replay_best([everything] * 3, 4).num_loads == 10
    assert replay_best([everything, [5], everything, [0, 1]], 1).num_loads == 6 + 0 + 5 + 1


def test_pinned_sections_are_loaded_once_and_stay() -> None:
    groups = [[key] for key in (0, 1, 2, 3) * 5]
    assert replay(groups, LeastRecent(), 3).num_loads == 20
    assert replay(groups, LeastRecent(), 3, pinned=[0, 1]).num_loads == 2 + 10
    with pytest.raises(ShapeError, match="at least 1 slot beside 3 pinned sections, got 3"):
        replay(groups, LeastRecent(), 3, pinned=[0, 1, 2])
    with pytest.raises(ShapeError, match="at least 1 slot"):
        replay_best(groups, 0)


def test_rates_and_bytes() -> None:
    found = replay([[0, 1], [0, 2]], LeastRecent(), 3)
    assert (found.hit_rate, found.count_bytes(100)) == (0.25, 300)
    assert replay([], LeastRecent(), 3).hit_rate == 0


@pytest.mark.parametrize("name", PolicyName)
@pytest.mark.parametrize("num_slots", [3, 5, 8])
def test_a_replay_counts_what_the_cache_reads(name: PolicyName, num_slots: int, tmp_path: Path) -> None:
    draw = random.Random(num_slots)
    groups = [sorted(draw.sample(range(12), draw.randint(1, 3))) for _ in range(150)]
    sections = write_sections(tmp_path / "w.bin")
    with SectionReader(1) as reader:
        cache = SectionCache(make_pool(num_slots), sections, reader, make_policy(name))
        for group in groups:
            _serve(cache, group)
        assert cache.stats.num_loads == replay(groups, make_policy(name), num_slots).num_loads


def _serve(cache: SectionCache, group: Sequence[int]) -> None:
    """As an expert source does."""
    cache.begin_turn()
    here = [key for key in group if cache.is_here(key)]
    for key in here:
        cache.pin(key)
    missing = [key for key in group if key not in here]
    for key in missing:
        assert cache.start(key)
        cache.pin(key)
    for key in here:
        cache.use(key)
    cache.settle(missing)
    for key in missing:
        cache.use(key)
    for key in group:
        cache.unpin(key)


def test_the_best_of_a_long_trace_is_found_fast() -> None:
    draw = random.Random(0)
    groups = [draw.sample(range(2000), 8) for _ in range(5000)]
    assert replay_best(groups, 800).num_loads < replay(groups, LeastRecent(), 800).num_loads
