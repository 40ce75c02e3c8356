"""Predictions for prompts and answers: by hand on a machine with round rates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from made_profiles import GIGA, make_profile
from moesys.models import AttentionConfig, RopeConfig
from moesys.planning.activity import Activity, RoutedLayer
from moesys.planning.ceilings import WeightFormat
from moesys.planning.cost import Bound
from moesys.planning.machine_profile import ReadWay
from moesys.planning.miss_rates import UniformMisses, count_misses
from moesys.planning.speed import SpeedModel
from moesys.store import ReadMode

EXPERT = 4_000_000
LAYER = RoutedLayer(64, 8, EXPERT, 2.0 * 8 * EXPERT / 2)
ACTIVITY = Activity(WeightFormat.BF16, 10, (LAYER,) * 10, 80_000_000, 60e6, 20e6, ())
NUM_EXPERTS = 640
SPEED = SpeedModel(
    make_profile(), ReadWay(ReadMode.BUFFERED, 1), ACTIVITY, UniformMisses(NUM_EXPERTS), 1000, EXPERT
)


def test_a_token_of_a_resident_model() -> None:
    """(80 MB + 320 MB of experts + 2 MB of keys and values) / 8 GB/s; the arithmetic is hidden."""
    prediction = SPEED.predict_decode(1, position=2000, num_slots=NUM_EXPERTS)
    assert prediction.seconds == prediction.seconds_if_skewed == pytest.approx(0.402 / 8)
    assert prediction.bound_tokens_per_s == pytest.approx(10 / 0.402)
    assert prediction.bound is Bound.MEMORY


def test_a_token_that_waits_for_the_disk() -> None:
    """Half of the experts are missing: 160 MB at 1 GB/s, then one expert of each layer at 8 GB/s."""
    prediction = SPEED.predict_decode(1, position=2000, num_slots=NUM_EXPERTS // 2)
    assert prediction.seconds == pytest.approx(0.082 / 8 + 0.16 + 0.04 / 8)
    assert prediction.tokens_per_s == pytest.approx(1 / prediction.seconds)
    assert prediction.bound is Bound.DISK
    assert prediction.bound_times.disk_s == pytest.approx(0.16 / 2), "by the best way to read"


def test_uneven_routing_misses_less_and_what_was_counted_has_no_range() -> None:
    prediction = SPEED.predict_decode(1, position=2000, num_slots=NUM_EXPERTS // 2)
    # 0.4 of the misses: 64 MB.
    assert prediction.seconds_if_skewed == pytest.approx(0.082 / 8 + 0.064 + 0.04 / 8)
    assert prediction.bound_times_if_skewed.disk_s == pytest.approx(0.064 / 2)
    logged = replace(SPEED, misses=count_misses([["a"], ["b"], ["a"]], "log"))
    counted = logged.predict_decode(1, position=2000, num_slots=1)
    assert counted.seconds == counted.seconds_if_skewed == pytest.approx(0.082 / 8 + 0.32 + 0.04 / 8)


def test_a_batch_shares_experts() -> None:
    one, eight = (SPEED.predict_decode(n, position=0, num_slots=NUM_EXPERTS) for n in (1, 8))
    touched = 64 * (1 - (1 - 1 / 8) ** 8)
    assert eight.seconds == pytest.approx((0.08 + 10 * touched * EXPERT / GIGA) / 8)
    assert eight.num_tokens == 8
    assert eight.tokens_per_s > one.tokens_per_s


def test_a_prompt_of_a_resident_model_is_arithmetic() -> None:
    """Per token 60 MFLOP of the core and 10 layers of 32 MFLOP each; the head once per pass; 100 GFLOP/s.
    Keys and values of 500, then 1000 tokens are read."""
    prediction = SPEED.predict_prefill(1000, 500, NUM_EXPERTS, num_held=NUM_EXPERTS)
    assert prediction.seconds == pytest.approx((1000 * (60e6 + 320e6) + 2 * 20e6) / 100e9 + 1.5e6 / 8e9)
    assert prediction.bound is Bound.ARITHMETIC
    assert prediction.bound_tokens_per_s == pytest.approx(1000 / ((1000 * 380e6 + 40e6) / 200e9))
    assert prediction.tokens_per_s == pytest.approx(1000 / prediction.seconds)


def test_a_prompt_from_the_disk_reads_all_experts_first_and_then_those_without_a_slot() -> None:
    """Every expert is needed: 2.56 GB at 1 GB/s; a quarter of them has slots; reading rules."""
    experts = NUM_EXPERTS * EXPERT / GIGA
    pass_s = (500 * 380e6 + 20e6) / 100e9
    first = max(experts + pass_s / 10, pass_s + experts / 10)
    later = max(0.75 * experts + pass_s / 10, pass_s + 0.75 * experts / 10)
    one = SPEED.predict_prefill(500, 500, NUM_EXPERTS // 4)
    three = SPEED.predict_prefill(1500, 500, NUM_EXPERTS // 4)
    assert one.seconds == pytest.approx(first, rel=1e-4)
    assert three.seconds == pytest.approx(first + 2 * later, rel=1e-4)
    assert three.bound_times.disk_s == pytest.approx((1 + 2 * 0.75) * experts / 2, rel=1e-4)


def test_experts_that_all_fit_are_read_once_and_those_that_are_there_are_not() -> None:
    experts = NUM_EXPERTS * EXPERT / GIGA
    cold, half, warm = (
        SPEED.predict_prefill(1500, 500, NUM_EXPERTS, num_held=held)
        for held in (0, NUM_EXPERTS // 2, NUM_EXPERTS)
    )
    assert cold.bound_times.disk_s == pytest.approx(experts / 2, rel=1e-4)
    assert half.bound_times.disk_s == pytest.approx(experts / 4, rel=1e-4)
    assert warm.bound_times.disk_s == 0
    assert cold.seconds > half.seconds > warm.seconds


def test_prompts_of_a_batch_attend_to_themselves_only() -> None:
    """Eight prompts in passes of their own cost eight times one, and a pass over several reads the keys of each."""
    attention = AttentionConfig(1, 1, 64, RopeConfig(64))
    model = replace(SPEED, activity=replace(ACTIVITY, mixers=(attention,) * 10))
    one = model.predict_prefill(512, 512, NUM_EXPERTS, num_held=NUM_EXPERTS)
    eight = model.predict_prefill(512, 512, NUM_EXPERTS, num_prompts=8, num_held=NUM_EXPERTS)
    together = model.predict_prefill(512, 4096, NUM_EXPERTS, num_prompts=8, num_held=NUM_EXPERTS)
    long = model.predict_prefill(4096, 4096, NUM_EXPERTS, num_held=NUM_EXPERTS)
    assert eight.num_tokens == together.num_tokens == 8 * one.num_tokens
    assert eight.seconds == pytest.approx(8 * one.seconds)
    heads_s = 7 * 20e6 / 200e9
    assert together.bound_times.arithmetic_s == pytest.approx(8 * one.bound_times.arithmetic_s - heads_s)
    more = attention.count_cached_products(4096) - attention.count_cached_products(512)
    longer_s = long.bound_times.arithmetic_s - together.bound_times.arithmetic_s
    assert longer_s == pytest.approx(10 * 2 * 4096 * more / 200e9)


@pytest.mark.parametrize(
    ("pass_tokens", "contexts"),
    [(100, 4 * 100), (150, 150 + 200 + 100), (60, 60 + 120 + 80 + 140 + 100 + 60 + 100)],
)
def test_the_keys_that_passes_across_prompts_read(pass_tokens: int, contexts: int) -> None:
    """Of four prompts of 100 tokens: 0 to 150 needs 100 of the first and 50 of the second."""
    dense = replace(SPEED, activity=replace(ACTIVITY, layers=(), core_bytes=0), misses=UniformMisses(0))
    prediction = dense.predict_prefill(100, pass_tokens, 0, num_prompts=4)
    assert prediction.bound_times.memory_s == pytest.approx(contexts * 1000 / (10 * GIGA))


def test_the_last_pass_has_what_is_left() -> None:
    whole, cut = (
        SPEED.predict_prefill(1100, count, NUM_EXPERTS, num_held=NUM_EXPERTS) for count in (500, 1100)
    )
    assert whole.num_tokens == cut.num_tokens == 1100
    assert whole.seconds == pytest.approx(cut.seconds + 2 * 20e6 / 100e9 + 1.5e6 / 8e9)


def test_a_few_tokens_read_few_experts() -> None:
    prediction = SPEED.predict_prefill(2, 512, 0)
    touched = 10 * 64 * (1 - (1 - 1 / 8) ** 2) * EXPERT
    assert prediction.bound_times.disk_s == pytest.approx(touched / (2 * GIGA))


def test_a_model_without_experts_never_reads() -> None:
    dense = replace(SPEED, activity=replace(ACTIVITY, layers=()), misses=UniformMisses(0), section_bytes=0)
    assert dense.predict_decode(1, 0, 0).bound_times.disk_s == 0
    assert dense.predict_prefill(600, 512, 0).bound_times.disk_s == 0
