"""Seconds of a step: every term by hand, on a machine with round rates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from made_profiles import GIGA, MIB, make_profile, make_rate
from moesys.planning.activity import Activity, RoutedLayer
from moesys.planning.ceilings import WeightFormat
from moesys.planning.cost import (
    Bound,
    StepRates,
    StepWork,
    compute_bound,
    compute_decode_seconds,
    compute_pass_seconds,
    find_ceilings,
    find_kernel_rates,
    find_stream_rates,
    slow_down,
)
from moesys.planning.machine_profile import Overlap, ReadWay
from moesys.store import ReadMode

BF16 = WeightFormat.BF16
RATES = StepRates(memory_bytes_per_s=100.0, flops_per_s=1000.0, disk_bytes_per_s=10.0)
ACTIVITY = Activity(BF16, 4, (RoutedLayer(8, 2, 100, 50.0),) * 4, 200, 100.0, 10.0, ())
WORK = StepWork(
    num_tokens=1,
    core_bytes=200,
    core_flops=100,
    expert_bytes=800,
    expert_flops=200,
    missed_bytes=0,
    kv_bytes=50,
    attention_flops=30,
)


def test_a_bound_is_the_largest_of_what_can_overlap() -> None:
    times = compute_bound(replace(WORK, missed_bytes=90), RATES)
    assert (times.memory_s, times.disk_s, times.arithmetic_s) == (10.5, 9.0, 0.33)
    assert (times.seconds, times.bound) == (10.5, Bound.MEMORY)
    assert compute_bound(replace(WORK, missed_bytes=106), RATES).bound is Bound.DISK
    assert compute_bound(replace(WORK, core_flops=11_000), RATES).bound is Bound.ARITHMETIC


def test_decoding_in_memory_reads_every_byte_once() -> None:
    assert compute_decode_seconds(WORK, ACTIVITY, RATES) == pytest.approx(2 + 0.5 + 8)
    slow = replace(RATES, overhead_s=0.25)
    assert compute_decode_seconds(WORK, ACTIVITY, slow) == pytest.approx(10.5 + 4 * 0.25)


def test_arithmetic_counts_where_it_takes_longer_than_memory() -> None:
    busy = replace(WORK, core_flops=3_000, attention_flops=700, expert_flops=9_000)
    assert compute_decode_seconds(busy, ACTIVITY, RATES) == pytest.approx(3 + 0.7 + 9)


@pytest.mark.parametrize(
    ("missed_bytes", "seconds"),
    [
        # 800 bytes of experts take 8 s. Reads that are shorter than that, with the last experts after them, are hidden.
        (40, 8.0),
        # 400 bytes take 40 s; then one expert of each of four layers, 100 bytes a second each, is computed.
        (400, 40.0 + 4.0),
        (800, 80.0 + 4.0),
        # Half an expert per layer is missing: as much is computed after.
        (200, 20.0 + 2.0),
    ],
)
def test_misses_are_read_while_the_others_are_computed(missed_bytes: float, seconds: float) -> None:
    work = replace(WORK, missed_bytes=missed_bytes)
    assert compute_decode_seconds(work, ACTIVITY, RATES) == pytest.approx(2.5 + seconds)


def test_a_pass_from_the_disk_is_the_slower_of_reading_and_computing_and_one_layer_of_the_other() -> None:
    """Of four layers: 10.5 s of computing, and reads of 4, 20 and 100 s."""
    for missed, seconds in ((40, 10.5 + 4 / 4), (200, 20 + 10.5 / 4), (1000, 100 + 10.5 / 4)):
        work = replace(WORK, missed_bytes=missed)
        assert compute_pass_seconds(work, ACTIVITY, RATES, RATES) == pytest.approx(seconds)


def test_where_nothing_is_read_nothing_is_slowed_down() -> None:
    slow = replace(RATES, memory_bytes_per_s=1.0)
    assert compute_pass_seconds(WORK, ACTIVITY, RATES, slow) == pytest.approx(10.5)


def test_overlapping_is_never_slower_than_taking_turns() -> None:
    slow = replace(RATES, memory_bytes_per_s=1.0, disk_bytes_per_s=1.0)
    work = replace(WORK, missed_bytes=40)
    assert compute_pass_seconds(work, ACTIVITY, RATES, slow) == pytest.approx(10.5 + 4)


def test_a_model_without_experts_only_has_a_core() -> None:
    dense = Activity(BF16, 4, (), 200, 100.0, 10.0, ())
    work = replace(WORK, expert_bytes=0, expert_flops=0)
    assert compute_decode_seconds(work, dense, RATES) == pytest.approx(2.5)
    assert compute_pass_seconds(work, dense, RATES, RATES) == pytest.approx(2.5)


def test_predictions_take_the_kernels_rates_and_bounds_the_machines() -> None:
    profile = make_profile(layer_overhead_s=0.5)
    way = ReadWay(ReadMode.BUFFERED, 1)
    assert find_kernel_rates(profile, BF16, way, 4 * MIB) == StepRates(
        8.0 * GIGA, 100.0 * GIGA, 1.0 * GIGA, 0.5
    )
    assert find_stream_rates(profile, BF16, way, 4 * MIB) == StepRates(
        8.0 * GIGA, 100.0 * GIGA, 1.0 * GIGA, 0.5
    )
    assert find_ceilings(profile, BF16) == StepRates(10.0 * GIGA, 200.0 * GIGA, 2.0 * GIGA)


def test_a_ceiling_is_never_below_what_our_kernels_reach() -> None:
    profile = make_profile(
        weight_read_bytes_per_s=dict.fromkeys(WeightFormat, 11.0 * GIGA),
        linear_flops_per_s=dict.fromkeys(WeightFormat, 300.0 * GIGA),
    )
    ceilings = find_ceilings(profile, BF16)
    assert (ceilings.memory_bytes_per_s, ceilings.flops_per_s) == (11.0 * GIGA, 300.0 * GIGA)


def test_bf16_products_are_no_ceiling_of_fp32_weights() -> None:
    profile = make_profile(gemm_flops_per_s={"fp32": 200.0 * GIGA, "bf16": 900.0 * GIGA})
    assert find_ceilings(profile, WeightFormat.FP32).flops_per_s == 200.0 * GIGA
    assert find_ceilings(profile, WeightFormat.INT8).flops_per_s == 900.0 * GIGA


def test_what_overlaps_keeps_the_share_that_it_kept_when_it_was_measured() -> None:
    profile = make_profile(
        memory_overlap=Overlap(disk_bytes_per_s=1.0, work_per_s=5.0 * GIGA),
        gemm_overlap=Overlap(disk_bytes_per_s=1.5 * GIGA, work_per_s=180.0 * GIGA),
    )
    slowed = slow_down(StepRates(8.0, 100.0, 4.0, 0.5), profile)
    assert slowed == StepRates(pytest.approx(4.0), pytest.approx(90.0), pytest.approx(3.0), 0.5)


def test_a_lucky_measurement_makes_nothing_faster() -> None:
    profile = make_profile(
        memory_overlap=Overlap(9.0 * GIGA, 90.0 * GIGA), gemm_overlap=Overlap(9.0 * GIGA, 900.0 * GIGA)
    )
    rates = StepRates(8.0, 100.0, 4.0)
    assert slow_down(rates, profile) == rates


def test_sections_are_read_at_the_rate_of_the_nearest_size() -> None:
    rates = (make_rate(ReadMode.DIRECT, 4, 1.0, MIB), make_rate(ReadMode.DIRECT, 4, 9.0, 12 * MIB))
    profile = make_profile(disk_rates=rates)
    way = ReadWay(ReadMode.DIRECT, 4)
    found = [
        find_kernel_rates(profile, BF16, way, size).disk_bytes_per_s for size in (1, 2 * MIB, 6 * MIB, 2**30)
    ]
    assert found == [1.0, 1.0, 9.0, 9.0]
