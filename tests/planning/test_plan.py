"""Plans: within any budget, never slower with more, by hand for one machine, and refused with the sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_profiles import GIGA, MIB, make_profile, make_rate
from moesys.errors import GenerationError
from moesys.models import AttentionConfig, RopeConfig
from moesys.planning.activity import Activity, RoutedLayer
from moesys.planning.budget import Budget
from moesys.planning.ceilings import WeightFormat
from moesys.planning.cost import find_stream_rates, slow_down
from moesys.planning.footprint import Footprint
from moesys.planning.plan import (
    BATCH_SIZES,
    PASS_TOKENS,
    Goal,
    InferencePlan,
    Spend,
    StepMode,
    Workload,
    describe_rate,
    make_plan,
    spend,
)
from moesys.store import ReadMode

GIB = 2**30
EXPERT = 12 * MIB
LAYER = RoutedLayer(64, 8, EXPERT, 2.0 * 8 * EXPERT / 2)
ACTIVITY = Activity(WeightFormat.BF16, 8, (LAYER,) * 8, 480 * MIB, 270e6, 200e6, ())
FOOTPRINT = Footprint(680 * MIB, (EXPERT,) * 512, 64 * 1024)
PROFILE = make_profile(
    layer_overhead_s=1e-4,
    disk_rates=tuple(
        make_rate(mode, depth, rate * GIGA, size, is_sequential=in_order)
        for mode, rates in ((ReadMode.BUFFERED, (0.9, 1.2)), (ReadMode.DIRECT, (0.8, 1.9)))
        for depth, rate in zip((1, 4), rates, strict=True)
        for size, in_order in ((4 * MIB, False), (12 * MIB, False), (16 * MIB, True))
    ),
)


def count_step_bytes(num_tokens: int, num_sequences: int = 1) -> int:
    return 100_000 * num_tokens + 1000 * (num_sequences - 1)


def plan_for(num_bytes: float, **options: Any) -> InferencePlan:
    wanted: dict[str, Any] = {
        "num_positions": 4096,
        "active": ACTIVITY,
        "step_bytes": count_step_bytes,
    }
    budget = options.pop("budget", Budget("RAM", int(num_bytes)))
    footprint = options.pop("footprint", FOOTPRINT)
    return make_plan(footprint, budget, options.pop("profile", PROFILE), **wanted | options)


def test_all_in_memory() -> None:
    plan = plan_for(16 * GIB)
    assert (plan.prefill_mode, plan.decode_mode) == (StepMode.RESIDENT, StepMode.RESIDENT)
    assert (plan.num_slots, plan.batch_size, plan.placement.disk_bytes) == (512, 1, 0)
    assert plan.decode.bound_times.disk_s == 0
    assert plan_for(16 * GIB, loads_first=True).prefill.bound_times.disk_s == 0
    half = plan_for(3.5 * GIB)
    assert plan_for(3.5 * GIB, loads_first=True).prefill == half.prefill, (
        "what does not fit is not loaded first"
    )
    # The first prompt reads them, at 1.9 GB/s.
    assert plan.prefill.bound_times.disk_s == pytest.approx(512 * EXPERT / (1.9 * GIGA), rel=1e-4)


def test_half_of_it_in_memory() -> None:
    plan = plan_for(3.5 * GIB)
    assert (plan.prefill_mode, plan.decode_mode) == (StepMode.RING, StepMode.CACHE)
    assert (plan.read_mode, plan.num_readers) == (ReadMode.DIRECT, 4)
    # Two passes: the second's reads are hidden behind computing, and half a step leaves room for slots.
    assert plan.prefill_tokens == 1024
    room = (3.5 * GIB - 4096 * 64 * 1024 - 1024 * 100_000 - 256 * MIB) / 1.02 - 680 * MIB
    assert plan.num_slots == int(room) // EXPERT
    assert plan.prefill == plan.speed.predict_prefill(2048, 1024, plan.num_slots)
    assert plan.decode == plan.speed.predict_decode(1, 2048 + 64, plan.num_slots)
    assert plan.seconds == pytest.approx(plan.prefill.seconds + 128 * plan.decode.seconds)


@pytest.mark.parametrize(("batch_size", "mode"), [(1, "cache"), (8, "cache"), (16, "ring"), (32, "ring")])
def test_a_batch_that_needs_most_experts_goes_through_the_ring(batch_size: int, mode: str) -> None:
    """16 tokens are expected to need 64 (1 - (7 / 8)^16) = 56.4 of 64 experts, 12 of them 51.1; the share is 80 %."""
    plan = plan_for(6 * GIB, batch_size=batch_size, num_positions=1024)
    assert plan.decode_mode == mode
    assert plan.prefill_mode is StepMode.RING
    assert f"writing {mode} at" in plan.describe()
    assert plan_for(16 * GIB, batch_size=batch_size, num_positions=1024).decode_mode is StepMode.RESIDENT


def test_the_ring_serves_decoding_ahead_of_time() -> None:
    """The same reads, but beside the computing, and of as many misses as slots are lacking."""
    plan = plan_for(6 * GIB, batch_size=16, num_positions=1024)
    touched = 512 * (1 - (7 / 8) ** 16) * EXPERT
    read_bytes = (1 - plan.num_slots / 512) * touched
    assert plan.decode.bound_times.disk_s == pytest.approx(read_bytes / (1.9 * GIGA))
    assert plan.decode.seconds == plan.decode.seconds_if_skewed, "nothing is assumed of the routing"
    rates = slow_down(find_stream_rates(PROFILE, WeightFormat.BF16, plan.speed.way, EXPERT), PROFILE)
    reading_s = read_bytes / rates.disk_bytes_per_s
    assert reading_s < plan.decode.seconds < 1.2 * reading_s


def test_experts_of_several_shapes_need_a_slot_each() -> None:
    footprint = replace(FOOTPRINT, section_bytes=(EXPERT, EXPERT // 2, EXPERT // 3) * 10)
    tight = next(
        size
        for size in range(700 * MIB, 2 * GIB, MIB)
        if spend_on(footprint, size).placement.tiers[0].num_experts == 2
    )
    assert not spend_on(footprint, tight).fits
    assert "3 experts 36.0 MiB" in spend_on(footprint, tight).explain(footprint)
    assert spend_on(footprint, tight + 13 * MIB).fits
    assert spend_on(FOOTPRINT, tight).fits


def spend_on(footprint: Footprint, num_bytes: int) -> Spend:
    return spend(
        footprint,
        Budget("RAM", num_bytes),
        num_positions=64,
        batch_size=1,
        pass_tokens=64,
        step_bytes=count_step_bytes,
    )


def test_passes_are_as_long_as_they_help() -> None:
    """A fast machine waits for the disk, and reads everything once rather than twice; a pass longer than the prompt
    would only take memory."""
    quick = replace(PROFILE, linear_flops_per_s=dict.fromkeys(WeightFormat, 5000.0 * GIGA))
    assert plan_for(3.5 * GIB, profile=quick).prefill_tokens == 2048
    heavy = plan_for(3.5 * GIB, profile=quick, step_bytes=lambda tokens, sequences: 900_000 * tokens)
    assert heavy.prefill_tokens < 2048
    assert plan_for(16 * GIB, num_positions=100).prefill_tokens == 100


def test_throughput_opens_many_sequences_and_latency_one() -> None:
    fast = plan_for(16 * GIB, goal=Goal.THROUGHPUT)
    assert fast.batch_size == 32
    assert fast.tier.kv_bytes == 32 * 4096 * 64 * 1024
    one = plan_for(16 * GIB)
    assert fast.seconds_per_sequence < one.seconds_per_sequence
    assert fast.decode.tokens_per_s > one.decode.tokens_per_s
    assert plan_for(16 * GIB, batch_size=3).batch_size == 3
    attention = replace(ACTIVITY, mixers=(AttentionConfig(16, 16, 128, RopeConfig(128)),) * 8)
    eight = plan_for(16 * GIB, batch_size=8, active=attention, num_positions=2048)
    assert eight.prefill == eight.speed.predict_prefill(
        eight.workload.prompt_tokens, eight.prefill_tokens, 512, num_prompts=8
    )


def test_keys_and_values_come_in_whole_pages() -> None:
    assert plan_for(16 * GIB, num_positions=100, batch_size=2).tier.kv_bytes == 2 * 128 * 64 * 1024


def test_the_fewest_readers_of_equals() -> None:
    rates = tuple(
        make_rate(mode, depth, 1.0 * GIGA, is_sequential=in_order)
        for mode in ReadMode
        for depth in (4, 1)
        for in_order in (True, False)
    )
    plan = plan_for(3 * GIB, profile=replace(PROFILE, disk_rates=rates))
    assert plan.num_readers == 1


def test_a_share_bounds_weights_only() -> None:
    plan = plan_for(0, budget=Budget("RAM", 3 * GIB, is_share=True))
    assert plan.tier.core_bytes + plan.tier.expert_bytes <= 3 * GIB < plan.tier.used_bytes


def test_a_workload_decides_what_is_fast() -> None:
    plan = plan_for(3.5 * GIB, workload=Workload(prompt_tokens=10, new_tokens=1000))
    assert plan.prefill_tokens == 512
    assert plan.prefill.num_tokens == 10


@pytest.mark.parametrize(
    ("num_positions", "prompt", "new"), [(4096, 2048, 128), (300, 172, 128), (10, 5, 5), (2, 1, 1), (1, 1, 1)]
)
def test_the_guess_fits_the_positions(num_positions: int, prompt: int, new: int) -> None:
    assert Workload.guess(num_positions) == Workload(prompt, new)


def test_what_cannot_be_held_is_refused_with_the_sum() -> None:
    with pytest.raises(GenerationError) as caught:
        plan_for(GIB)
    # 680 + 24 + 256 + 48.8 + (256 + 2 % of 704 MiB)
    assert str(caught.value) == (
        "--host-memory 1.0 GiB is less than resident weights 680.0 MiB + 2 experts 24.0 MiB + keys and values of 4096 "
        "tokens 256.0 MiB + a pass of 512 tokens 48.8 MiB + a reserve 270.1 MiB = 1.2 GiB; raise it"
    )
    with pytest.raises(
        GenerationError, match=r"is less than resident weights 680.0 MiB \+ 2 experts 24.0 MiB = 704"
    ):
        plan_for(0, budget=Budget("RAM", 700 * MIB, is_share=True))
    dense = Footprint(680 * MIB, (), 0)
    with pytest.raises(GenerationError, match=r"weights 680.0 MiB \+ keys") as caught:
        plan_for(500 * MIB, footprint=dense, active=replace(ACTIVITY, layers=()))
    assert "experts" not in str(caught.value)
    with pytest.raises(GenerationError, match=r"is less than resident weights 680.0 MiB; raise it$"):
        plan_for(
            0,
            budget=Budget("RAM", 500 * MIB, is_share=True),
            footprint=dense,
            active=replace(ACTIVITY, layers=()),
        )
    with pytest.raises(GenerationError, match=r"raise it, or open fewer than 1000000 sequences at once$"):
        plan_for(16 * GIB, batch_size=1_000_000)


def test_what_is_needed_is_enough() -> None:
    needed = int((680 + 24) * MIB * 1.02) + 256 * MIB + 4096 * 64 * 1024 + 512 * 100_000 + 2
    assert plan_for(needed).num_slots == 2
    with pytest.raises(GenerationError):
        plan_for(needed - MIB)


def test_one_line_for_people() -> None:
    line = plan_for(3.5 * GIB).describe()
    assert "of 512 experts in memory, a first prompt of 2048 tokens ring in passes of 1024 at about" in line
    assert "writing cache at about" in line
    low, high = describe_rate(plan_for(3.5 * GIB).decode).removesuffix(" tokens/s").split(" to ")
    assert 0 < float(low) < float(high)
    assert " to " not in describe_rate(plan_for(16 * GIB).decode)


SIZES = st.integers(int(1.35 * GIB), 12 * GIB)
"""Budgets that hold the least for up to 5,000 positions: 1.31 GiB, as `test_what_is_needed_is_enough` counts it."""


@settings(deadline=None, max_examples=40)
@given(SIZES, st.sampled_from(list(Goal)), st.booleans(), st.integers(1, 5000))
def test_no_budget_is_exceeded(num_bytes: int, goal: Goal, is_share: bool, num_positions: int) -> None:
    budget = Budget("RAM", num_bytes, is_share)
    plan = plan_for(0, budget=budget, goal=goal, num_positions=num_positions)
    tier = plan.tier
    bounded = tier.core_bytes + tier.expert_bytes if is_share else tier.used_bytes
    assert bounded <= num_bytes + 1
    assert tier.expert_bytes == plan.num_slots * EXPERT
    assert tier.step_bytes == count_step_bytes(plan.prefill_tokens + plan.batch_size - 1, plan.batch_size)
    assert plan.prefill_tokens in {min(tokens, num_positions) for tokens in PASS_TOKENS}
    assert plan.batch_size in BATCH_SIZES


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 2 * GIB), st.sampled_from(list(Goal)))
def test_more_memory_is_never_predicted_slower(num_bytes: int, more_bytes: int, goal: Goal) -> None:
    less, more = (plan_for(size, goal=goal) for size in (num_bytes, num_bytes + more_bytes))
    assert more.seconds_per_sequence <= less.seconds_per_sequence * (1 + 1e-12)


@settings(deadline=None, max_examples=40)
@given(SIZES, st.sampled_from(list(Goal)))
def test_no_prediction_beats_its_bound(num_bytes: int, goal: Goal) -> None:
    plan = plan_for(num_bytes, goal=goal)
    for prediction in (plan.prefill, plan.decode):
        assert prediction.tokens_per_s <= prediction.bound_tokens_per_s
        assert prediction.tokens_per_s_if_skewed <= prediction.bound_tokens_per_s_if_skewed
        assert prediction.tokens_per_s <= prediction.tokens_per_s_if_skewed


@settings(deadline=None, max_examples=20)
@given(SIZES)
def test_a_goal_is_served_by_no_other_batch_better(num_bytes: int) -> None:
    best = plan_for(num_bytes, goal=Goal.THROUGHPUT)
    others = []
    for batch_size in BATCH_SIZES:
        try:
            others.append(plan_for(num_bytes, batch_size=batch_size).seconds_per_sequence)
        except GenerationError:
            continue
    assert best.seconds_per_sequence == min(others)
