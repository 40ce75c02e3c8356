"""Measured ceilings: plausible, free of side effects, and decisive."""

from __future__ import annotations

import pytest
import torch

from moesys.planning import ceilings, choose_faster_dtype, measure_gemm_rate, measure_memory_read_rate

CPU = torch.device("cpu")


def test_the_rate_counts_two_operations_per_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by half a second per look, so the best product takes exactly that."""
    ticks = iter(range(1000))
    monkeypatch.setattr(ceilings, "_SIZE", 8)
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(ticks) / 2)
    assert measure_gemm_rate(torch.float32, CPU) == 2 * 8**3 / 0.5


def test_the_best_product_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_SIZE", 8)
    monkeypatch.setattr(ceilings, "_MIN_SECONDS", 10.0)
    times = iter([0.0, 1.0, 4.0, 4.0, 5.0, 5.5, 6.0, 7.0, 9.0, 11.0])
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(times))
    assert measure_gemm_rate(torch.float32, CPU) == 2 * 8**3 / 0.5


def test_measuring_leaves_the_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_SIZE", 8)
    before = torch.get_rng_state()
    assert measure_gemm_rate(torch.bfloat16, CPU) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("bf16_rate", "chosen"), [(4.0, torch.bfloat16), (1.5, torch.bfloat16), (1.4, torch.float32)]
)
def test_bf16_is_chosen_where_it_is_clearly_faster(
    bf16_rate: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.bfloat16: bf16_rate, torch.float32: 1.0}
    monkeypatch.setattr(ceilings, "measure_gemm_rate", lambda dtype, device: rates[dtype])
    assert choose_faster_dtype(CPU) is chosen


def test_the_read_rate_is_that_of_the_fastest_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_READ_BYTES", 2**20)
    ticks = iter([0.0, 4.0, 10.0, 10.5, *(float(20 + n // 2 * 10 + n % 2 * 3) for n in range(12))])
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(ticks))
    assert measure_memory_read_rate() == 2**20 / 0.5
