"""Misses by the number of slots: uniform as simulated, logged as the cache would count them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.planning.miss_rates import UniformMisses, count_misses
from moesys.store.policy import LeastRecent
from moesys.store.replay import replay

LOGS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), min_size=1, max_size=40)


def test_uniform_misses_are_the_share_that_is_not_there() -> None:
    misses = UniformMisses(512)
    assert [misses.find_rate(n) for n in (0, 128, 512, 600)] == [1.0, 0.75, 0.0, 0.0]
    assert UniformMisses(0).find_rate(5) == 0.0


def test_a_simulation_of_uniform_routing_agrees() -> None:
    """Two layers of 64 experts, 16 per token, through LRU slots for one token's experts, two's, and some between."""
    draw = random.Random(0)
    log = [[(layer, e) for e in draw.sample(range(64), 16)] for _ in range(2000) for layer in range(2)]
    one, between, two = (1 - replay(log, LeastRecent(), n).hit_rate for n in (32, 44, 56))
    uniform = UniformMisses(128)
    assert one == pytest.approx(uniform.find_rate(32), abs=0.01)
    assert two == pytest.approx(uniform.find_rate(56), abs=0.05)
    assert uniform.find_rate(44) < between < one + 0.01


@given(LOGS, st.integers(1, 12))
def test_logged_misses_are_those_of_a_replay(log: list[list[int]], num_slots: int) -> None:
    """Of groups of one, whose order nobody changes; first uses are left out."""
    singles = [[key] for group in log for key in group]
    result = replay(singles, LeastRecent(), num_slots)
    repeats = result.num_demands - result.num_first
    expected = (result.num_loads - result.num_first) / repeats if repeats else 1.0
    assert count_misses(singles, "test").find_rate(num_slots) == pytest.approx(expected)


def test_groups_cost_what_they_cost_in_a_replay_but_for_the_order_inside() -> None:
    draw = random.Random(1)
    weights = [1 / (1 + e) for e in range(32)]
    log = [sorted({(e % 2, e) for e in draw.choices(range(32), weights, k=6)}) for _ in range(1500)]
    misses = count_misses(log, "test")
    for num_slots in (8, 16, 24):
        result = replay(log, LeastRecent(), num_slots)
        assert misses.find_rate(num_slots) == pytest.approx(1 - result.hit_rate, abs=0.03)


def test_depths_by_hand() -> None:
    misses = count_misses([["a"], ["b"], ["a"], ["c"], ["b"]], "by hand")
    assert misses.depths == (2, 3)
    assert [misses.find_rate(n) for n in (1, 2, 3)] == [1.0, 0.5, 0.0]
    assert (misses.is_assumed, misses.source) == (False, "by hand")


@given(LOGS)
def test_more_slots_never_miss_more(log: list[list[int]]) -> None:
    misses = count_misses(log, "test")
    rates = [misses.find_rate(n) for n in range(12)]
    assert rates == sorted(rates, reverse=True)


def test_a_log_without_repeats_always_misses() -> None:
    assert count_misses([["a"], ["b"]], "short").find_rate(9) == 1.0
