"""After a run: what was promised, what came of it, and how close that is to what the machine allows."""

from __future__ import annotations

from dataclasses import dataclass

from moesys.planning.cost import Bound, BoundTimes
from moesys.planning.plan import format_range
from moesys.planning.speed import Prediction
from moesys.units import format_rate


@dataclass(frozen=True)
class PredictionReport:
    """Of one kind of step, such as ``prefill`` or ``decode``. Rates are tokens per second.

    predicted_if_skewed:  as fast as it could have been with the misses of uneven routing.
    bound:                what it could not have been faster than, at the rate ``bound_rate``.
    """

    kind: str
    measured: float
    predicted: float
    predicted_if_skewed: float
    bound: Bound
    bound_rate: float

    @property
    def share(self) -> float:
        """Of the bound that was reached."""
        return self.measured / self.bound_rate

    def describe(self) -> str:
        """One line for people."""
        promised = format_range(self.predicted, self.predicted_if_skewed)
        return (
            f"{self.kind}: {format_rate(self.measured)} tokens/s, predicted {promised}; {self.share:.0%} of the "
            f"{format_rate(self.bound_rate)} that {_NAMES[self.bound]} allows"
        )


_NAMES = {Bound.MEMORY: "the memory", Bound.DISK: "the disk", Bound.ARITHMETIC: "the arithmetic"}


def report_prediction(
    kind: str, prediction: Prediction, num_tokens: int, seconds: float, read_bytes: int | None = None
) -> PredictionReport:
    """Compares ``num_tokens`` tokens that took ``seconds`` with what was predicted of their kind.

    read_bytes: what came from the disk for them, which makes the disk's bound exact; None takes what was predicted.
    """
    steps = num_tokens / prediction.num_tokens
    times = prediction.bound_times
    disk_s = steps * times.disk_s if read_bytes is None else read_bytes / prediction.disk_bytes_per_s
    least = BoundTimes(steps * times.memory_s, disk_s, steps * times.arithmetic_s)
    return PredictionReport(
        kind=kind,
        measured=num_tokens / seconds,
        predicted=prediction.tokens_per_s,
        predicted_if_skewed=prediction.tokens_per_s_if_skewed,
        bound=least.bound,
        bound_rate=num_tokens / least.seconds,
    )
