"""What a run within a budget came to: the traffic between disk and memory, and what was promised beside what was kept.

Arithmetic on counts that others took; measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from moesys.inference.generate import GenerationStats
from moesys.inference.offload import OffloadedModel
from moesys.moe import PredictionScore
from moesys.planning import InferencePlan, Prediction, PredictionReport, report_prediction
from moesys.store import CacheStats, replay_best


@dataclass(frozen=True)
class Traffic:
    """Between the disk and memory in one part of a run. Shares are None where nothing can be said.

    hit_rate:               of expert uses, those that found the expert in memory.
    disk_bytes_per_token:   read, used or not.
    memory_bytes_per_token: of experts that were used, wherever they lay.
    stall_s_per_token:      in which the computation waited for the disk.
    wasted_bytes:           read and never used.
    transfer_share:         bytes that were read and used, by what the disk could have read in the time.
    """

    num_tokens: int
    seconds: float
    hit_rate: float | None
    num_loads: int
    disk_bytes_per_token: float
    memory_bytes_per_token: float
    stall_s_per_token: float
    wasted_bytes: int
    transfer_share: float | None


@dataclass(frozen=True)
class RunReport:
    """Of one text.

    policy_share:   the loads that the best possible choice of what stays would have taken, by those that were taken;
                    None where routing was not recorded.
    guesses:        of the predictor; None without one.
    predictions:    one for each kind of step that the plan had a forecast for.
    """

    prefill: Traffic
    decode: Traffic | None
    policy_share: float | None
    guesses: PredictionScore | None
    predictions: tuple[PredictionReport, ...]


class RunMeter:
    """Watches one text being written by an offloaded model. Make it before the text begins."""

    def __init__(self, offloaded: OffloadedModel) -> None:
        self._offloaded = offloaded
        self._before = offloaded.stats
        self._at_first_token = self._before

    def note_first_token(self) -> None:
        """Says that the prompt is computed and writing begins."""
        self._at_first_token = self._offloaded.stats

    def report(self, stats: GenerationStats) -> RunReport:
        """Returns what the run came to, when the text is written."""
        plan = self._offloaded.plan.predicted
        prefill = self._measure(
            stats.prompt_tokens, stats.prefill_s, _subtract(self._at_first_token, self._before)
        )
        decode = None
        if stats.new_tokens > 1:
            of_decode = _subtract(self._offloaded.stats, self._at_first_token)
            decode = self._measure(stats.new_tokens - 1, stats.decode_s, of_decode)
        predictions = [] if plan is None else [_compare("prompt", _predict_prompt(plan, stats), prefill)]
        if plan is not None and decode is not None:
            position = stats.prompt_tokens + stats.new_tokens / 2
            predicted = plan.speed.predict_decode(1, position, plan.num_slots)
            predictions.append(_compare("writing", predicted, decode))
        predictor = self._offloaded.predictor
        return RunReport(
            prefill,
            decode,
            compute_policy_share(self._offloaded),
            None if predictor is None else predictor.score,
            tuple(predictions),
        )

    def _measure(self, num_tokens: int, seconds: float, stats: CacheStats) -> Traffic:
        asked = stats.num_hits + stats.num_misses
        plan = self._offloaded.plan
        transfer_share = None
        if plan.predicted is not None and seconds > 0:
            disk_rate = plan.predicted.speed.profile.find_best_read(plan.footprint.slot_bytes).bytes_per_s
            transfer_share = stats.used_bytes / disk_rate / seconds
        return Traffic(
            num_tokens=num_tokens,
            seconds=seconds,
            hit_rate=stats.num_hits / asked if asked else None,
            num_loads=stats.num_loads,
            disk_bytes_per_token=stats.loaded_bytes / num_tokens,
            memory_bytes_per_token=asked * plan.footprint.slot_bytes / num_tokens,
            stall_s_per_token=stats.stall_s / num_tokens,
            wasted_bytes=stats.wasted_bytes,
            transfer_share=transfer_share,
        )


def describe_traffic(report: RunReport) -> Iterator[str]:
    """Yields lines for people, those of the forecast last."""
    for name, traffic in (("prompt", report.prefill), ("writing", report.decode)):
        if traffic is None or traffic.hit_rate is None:
            continue
        shares = (
            "" if traffic.transfer_share is None else f", {traffic.transfer_share:.0%} of the disk's rate"
        )
        yield (
            f"{name}: {traffic.hit_rate:.0%} of expert uses found in memory, "
            f"{traffic.disk_bytes_per_token / 2**20:.1f} MiB read and {1000 * traffic.stall_s_per_token:.1f} ms waited "
            f"per token{shares}"
        )
    if report.guesses is not None:
        yield (
            f"guesses: {report.guesses.precision:.0%} of {report.guesses.num_guessed} experts read ahead were needed, "
            f"which was {report.guesses.recall:.0%} of those missing"
        )
    if report.policy_share is not None:
        yield f"policy: the best possible choice of what stays would have read {report.policy_share:.0%} as many"
    for prediction in report.predictions:
        yield prediction.describe()


def compute_policy_share(offloaded: OffloadedModel) -> float | None:
    """Returns the loads of Belady's rule for what every layer asked for, by the loads that there were."""
    num_loads = offloaded.stats.num_loads
    if offloaded.recorder is None or not num_loads:
        return None
    demands = list(offloaded.recorder.make_log().demands())
    best = 0
    for layout, cache in offloaded.caches.items():
        own = [d for d in demands if d and offloaded.experts.layouts[d[0][0]] == layout]
        best += replay_best(own, cache.pool.num_slots).num_loads
    return best / num_loads


def _predict_prompt(plan: InferencePlan, stats: GenerationStats) -> Prediction:
    pass_tokens = min(plan.prefill_tokens, stats.prompt_tokens)
    return plan.speed.predict_prefill(stats.prompt_tokens, pass_tokens, plan.num_slots)


def _compare(kind: str, predicted: Prediction, traffic: Traffic) -> PredictionReport:
    read_bytes = round(traffic.disk_bytes_per_token * traffic.num_tokens)
    return report_prediction(kind, predicted, traffic.num_tokens, traffic.seconds, read_bytes)


def _subtract(later: CacheStats, earlier: CacheStats) -> CacheStats:
    names = [field.name for field in fields(CacheStats)]
    return CacheStats(**{name: getattr(later, name) - getattr(earlier, name) for name in names})
