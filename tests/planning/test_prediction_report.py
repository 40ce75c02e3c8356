"""What was promised against what came of it."""

from __future__ import annotations

import pytest

from moesys.planning.cost import Bound, BoundTimes
from moesys.planning.prediction_report import report_prediction
from moesys.planning.speed import Prediction

STEP = Prediction(
    num_tokens=2,
    seconds=1.0,
    seconds_if_skewed=0.5,
    bound_times=BoundTimes(memory_s=0.2, disk_s=0.4, arithmetic_s=0.1),
    bound_times_if_skewed=BoundTimes(memory_s=0.2, disk_s=0.1, arithmetic_s=0.1),
    disk_bytes_per_s=1000.0,
)


def test_what_was_predicted_bounds_where_nothing_was_counted() -> None:
    report = report_prediction("decode", STEP, num_tokens=20, seconds=8.0)
    assert (report.measured, report.predicted, report.predicted_if_skewed) == (2.5, 2.0, 4.0)
    assert (report.bound, report.bound_rate) == (Bound.DISK, 5.0)
    assert report.share == 0.5
    assert report.describe() == ("decode: 2.5 tokens/s, predicted 2 to 4; 50% of the 5 that the disk allows")


@pytest.mark.parametrize(
    ("read_bytes", "bound", "rate"),
    [(8000, Bound.DISK, 2.5), (1000, Bound.MEMORY, 10.0), (0, Bound.MEMORY, 10.0)],
)
def test_what_was_read_makes_the_disks_bound_exact(read_bytes: int, bound: Bound, rate: float) -> None:
    report = report_prediction("decode", STEP, num_tokens=20, seconds=8.0, read_bytes=read_bytes)
    assert (report.bound, report.bound_rate) == (bound, pytest.approx(rate))
