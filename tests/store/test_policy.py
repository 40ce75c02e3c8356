"""Policies find the victims of their plainest form, fast."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_policies import SlowFadingCounts, SlowHitCounts, SlowLeastFrequent

from moesys.store.policy import (
    FadingCounts,
    HitCounts,
    LeastFrequent,
    LeastRecent,
    Policy,
    PolicyName,
    make_policy,
)
from moesys.store.usage import UsageProfile

KEYS = range(6)


@st.composite
def draw_events(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Loads, uses and questions in plenty: a seed is drawn, so that long histories are as likely as short ones."""
    random_ = random.Random(draw(st.integers(0, 2**32)))
    names = random_.choices(
        ["load", "use", "drop", "ask", "evict"], [3, 10, 1, 2, 2], k=draw(st.integers(0, 150))
    )
    return [
        (
            name,
            random_.sample(KEYS, random_.randrange(4)) if name in ("ask", "evict") else random_.choice(KEYS),
        )
        for name in names
    ]


EVENTS = draw_events()


def assert_same_victims(fast: Policy, slow: Policy, events: list[tuple[str, Any]]) -> None:
    here: set[int] = set()

    def tell(name: str, key: Any) -> None:
        for policy in (fast, slow):
            getattr(policy, name)(key)

    for event, what in events:
        if event == "load" and what not in here:
            here.add(what)
            tell("record_load", what)
        elif event == "use" and what in here:
            tell("record_use", what)
        elif event == "drop" and what in here:
            here.remove(what)
            tell("record_eviction", what)
        elif event in ("ask", "evict"):
            victim = slow.choose_victim(lambda key, held=what: key not in held)
            assert fast.choose_victim(lambda key, held=what: key not in held) == victim
            if event == "evict" and victim is not None:
                here.remove(victim)
                tell("record_eviction", victim)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_the_least_frequent_is_that_of_the_plain_rule(events: list[tuple[str, Any]]) -> None:
    assert_same_victims(LeastFrequent(), SlowLeastFrequent(), events)


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.sampled_from([0.5, 0.9, 1.0, 0.0]), st.integers(1, 9), st.sampled_from([1.0, 2.0, 2.5]))
def test_hit_counts_are_those_of_the_plain_rule(
    events: list[tuple[str, Any]], decay: float, period: int, threshold: float
) -> None:
    assert_same_victims(HitCounts(threshold, decay, period), SlowHitCounts(threshold, decay, period), events)


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.sampled_from([0.7, 2.0, 24.0]))
def test_fading_counts_are_those_of_the_plain_rule(events: list[tuple[str, Any]], half_life: float) -> None:
    """But for sections whose counts differ by rounding only."""
    fast, slow = FadingCounts(half_life), SlowFadingCounts(half_life)
    here: set[tuple[int, int]] = set()
    for event, what in events:
        if event in ("load", "use", "drop"):
            key = (what // 3, what)
            if event == "load" and key not in here:
                here.add(key)
                fast.record_load(key)
                slow.record_load(key)
            elif event == "use" and key in here:
                fast.record_use(key)
                slow.record_use(key)
            continue
        held = {(number // 3, number) for number in what}
        victim = fast.choose_victim(lambda key, held=held: key not in held)
        expected = slow.choose_victim(lambda key, held=held: key not in held)
        if victim != expected:
            assert isinstance(victim, tuple)
            assert isinstance(expected, tuple)
            assert slow.compute_count(victim) == pytest.approx(slow.compute_count(expected), rel=1e-12)
        if event == "evict" and isinstance(victim, tuple):
            here.remove(victim)
            fast.record_eviction(victim)
            slow.record_eviction(victim)


def test_fading_counts_lie_between_recency_and_frequency() -> None:
    victims = []
    for half_life in (0.1, 8.0, 1e6):
        policy = FadingCounts(half_life)
        for key in "abc":
            policy.record_load(key)
        for key in "aaaaaa" + "bbb" * 4 + "cbc":
            policy.record_use(key)
        victims.append(policy.choose_victim(lambda key: True))
    assert victims == ["a", "a", "c"]


def test_a_group_that_waits_for_its_turn_does_not_look_old() -> None:
    policy = FadingCounts(half_life=2.0)
    for group in range(40):
        policy.record_load((group, 0))
    for group in range(40):
        policy.record_use((group, 0))
    assert policy.choose_victim(lambda key: True) == (0, 0), (
        "the one loaded first, as all were used as lately"
    )
    policy.record_use((0, 0))
    assert policy.choose_victim(lambda key: True) == (1, 0)


def test_fading_counts_go_on_from_the_rates_of_a_profile() -> None:
    usage = UsageProfile("model", {(0, 0): 300.0, (0, 1): 100.0, (0, 2): 0.0, (0, 3): 20.0})
    policy = make_policy(PolicyName.LRFU, usage)
    for expert in range(4):
        policy.record_load((0, expert))
    assert policy.choose_victim(lambda key: True) == (0, 2)
    for _ in range(3):
        policy.record_use((0, 2))
    order = []
    for _ in range(4):
        order.append(policy.choose_victim(lambda key: key not in order))
    assert order == [(0, 3), (0, 2), (0, 1), (0, 0)]


@pytest.mark.parametrize("policy", PolicyName)
def test_finding_a_victim_looks_at_few_of_many(policy: PolicyName) -> None:
    made, asked = make_policy(policy), 0

    def may_leave(key: object) -> bool:
        nonlocal asked
        asked += 1
        return True

    for key in range(4000):
        made.record_load(key)
        made.record_use(key)
    for key in range(4000, 4200):
        victim = made.choose_victim(may_leave)
        made.record_eviction(victim)
        made.record_load(key)
        made.record_use(key)
    assert asked == 200


@pytest.mark.parametrize("policy", PolicyName)
def test_a_policy_grows_with_its_sections_and_not_with_time(policy: PolicyName) -> None:
    made, draw = make_policy(policy), random.Random(0)
    here: list[int] = []
    for _ in range(3000):
        key = draw.randrange(12)
        if key not in here:
            if len(here) == 4:
                victim = made.choose_victim(lambda key: True)
                assert isinstance(victim, int)
                here.remove(victim)
                made.record_eviction(victim)
            here.append(key)
            made.record_load(key)
        made.record_use(key)
    rankings = [value for value in vars(made).values() if hasattr(value, "_heap")]
    assert sum(len(ranking._heap) for ranking in rankings) < 600


def test_names_make_their_policies() -> None:
    made = {name: type(make_policy(name)) for name in PolicyName}
    assert made == {
        PolicyName.LRU: LeastRecent,
        PolicyName.LFU: LeastFrequent,
        PolicyName.MOESYS: HitCounts,
        PolicyName.LRFU: FadingCounts,
    }


def test_frequency_goes_on_from_a_profile() -> None:
    usage = UsageProfile("model", {(0, 1): 5.0, (0, 2): 1.0})
    made = make_policy(PolicyName.LFU, usage)
    for key in ((0, 1), (0, 2), (0, 3)):
        made.record_load(key)
    for _ in range(3):
        made.record_use((0, 3))
    assert made.choose_victim(lambda key: True) == (0, 2)
    assert made.choose_victim(lambda key: key != (0, 2)) == (0, 3)
    assert usage.counts == {(0, 1): 5.0, (0, 2): 1.0}
