"""The learning rate at its corners, and its shape between them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moesys.config import TrainingConfig
from moesys.training.schedule import compute_learning_rate


def rates(**settings: object) -> list[float]:
    config = TrainingConfig.model_validate({"learning_rate": 2.0, **settings})
    return [compute_learning_rate(config, step) for step in range(config.steps)]


def test_cosine_passes_its_corners() -> None:
    values = rates(steps=21, warmup_steps=4, final_learning_rate_ratio=0.25)
    assert values[:4] == [0.5, 1.0, 1.5, 2.0]
    assert values[4] == 2.0
    assert values[12] == pytest.approx((2.0 + 0.5) / 2)
    assert values[8] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
    assert values[20] == pytest.approx(0.5, rel=1e-12)


def test_wsd_is_flat_and_then_linear() -> None:
    values = rates(
        steps=20, warmup_steps=2, schedule="wsd", decay_fraction=0.25, final_learning_rate_ratio=0.0
    )
    assert values[:2] == [1.0, 2.0]
    assert values[2:15] == [2.0] * 13
    assert values[15:] == pytest.approx([1.6, 1.2, 0.8, 0.4, 0.0])


def test_wsd_without_decay_stays_at_the_peak() -> None:
    assert rates(steps=5, warmup_steps=1, schedule="wsd", decay_fraction=0.0) == [2.0] * 5


def test_wsd_may_decay_right_after_its_warmup_but_not_during_it() -> None:
    values = rates(
        steps=10, warmup_steps=5, schedule="wsd", decay_fraction=0.5, final_learning_rate_ratio=0.0
    )
    assert values == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 1.6, 1.2, 0.8, 0.4, 0.0])
    with pytest.raises(
        ValueError,
        match=r"warmup_steps \(5\) and the decay of wsd \(6 steps, decay_fraction 0.6\) overlap in 10 steps; "
        r"try decay_fraction = 0.5",
    ):
        rates(steps=10, warmup_steps=5, schedule="wsd", decay_fraction=0.6)


def test_a_small_decay_takes_one_step() -> None:
    values = rates(
        steps=10, warmup_steps=0, schedule="wsd", decay_fraction=0.01, final_learning_rate_ratio=0.0
    )
    assert values == [2.0] * 9 + [0.0]


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert rates(steps=5, warmup_steps=0)[0] == 2.0


@given(
    steps=st.integers(2, 60),
    warmup=st.integers(0, 58),
    schedule=st.sampled_from(["cosine", "wsd"]),
    final=st.floats(0, 1),
    decay=st.floats(0, 1, exclude_min=True),
)
def test_it_rises_then_never_rises_again(
    steps: int, warmup: int, schedule: str, final: float, decay: float
) -> None:
    warmup = min(warmup, steps - 2)
    assume(schedule == "cosine" or warmup + max(1, round(decay * steps)) <= steps)
    values = rates(
        steps=steps,
        warmup_steps=warmup,
        schedule=schedule,
        final_learning_rate_ratio=final,
        decay_fraction=decay,
    )
    assert all(earlier < later for earlier, later in pairwise(values[:warmup]))
    after = values[warmup:]
    assert all(earlier >= later - 1e-12 for earlier, later in pairwise(after))
    assert all(2.0 * final - 1e-9 <= value <= 2.0 for value in after)
    assert values[-1] == pytest.approx(2.0 * final, abs=1e-9)
