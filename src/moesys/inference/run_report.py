"""What a run within a budget came to: the traffic between disk and memory, and what was promised beside what was kept.

Arithmetic on counts that others took; measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from moesys.inference.batch import BatchStats
from moesys.inference.generate import GenerationStats
from moesys.inference.offload import OffloadedModel
from moesys.moe import ExpertKey, SlotLayout
from moesys.planning import InferencePlan, Prediction, PredictionReport, report_prediction
from moesys.store import CacheStats, replay_best


@dataclass(frozen=True)
class Traffic:
    """Between the disk and memory in one part of a run. Shares are None where nothing can be said.

    hit_rate:                of expert uses, those that found the expert in memory.
    disk_bytes_per_token:    read, used or not.
    memory_bytes_per_token:  of experts that were used, wherever they lay.
    stall_s_per_token:       in which the computation waited for the disk.
    wasted_bytes:            of experts that left, or were given up, before anybody used them.
    num_guessed, num_right:  experts read ahead on a predictor's guess, and of them those that were used.
    transfer_share:          bytes that were read and used, by what the disk could have read in the time.
    policy_share:            the loads that the best possible choice of what stays would have taken, by those that were
                             taken; None where demands were not noted.
    """

    num_tokens: int
    seconds: float
    hit_rate: float | None
    num_loads: int
    disk_bytes_per_token: float
    memory_bytes_per_token: float
    stall_s_per_token: float
    wasted_bytes: int
    num_guessed: int
    num_right: int
    transfer_share: float | None
    policy_share: float | None

    @property
    def precision(self) -> float | None:
        """Share of the guesses that were used; None without guesses."""
        return self.num_right / self.num_guessed if self.num_guessed else None


@dataclass(frozen=True)
class RunReport:
    """Of one text, or of a batch: then everything is in ``writing``.

    predictions:  one for each part that the plan had a forecast for.
    """

    prompt: Traffic | None
    writing: Traffic | None
    predictions: tuple[PredictionReport, ...]

    def describe(self) -> Iterator[str]:
        """Yields lines for people, those of the forecast last."""
        for name, traffic in (("prompt", self.prompt), ("writing", self.writing)):
            if traffic is not None and traffic.hit_rate is not None:
                yield _describe(name, traffic)
        for prediction in self.predictions:
            yield prediction.describe()

    def encode(self) -> dict[str, Any]:
        """Returns the same as JSON values."""
        return {
            "prompt": None if self.prompt is None else _encode(self.prompt),
            "writing": None if self.writing is None else _encode(self.writing),
            "predictions": [
                _encode(prediction) | {"share": prediction.share} for prediction in self.predictions
            ],
        }


class RunMeter:
    """Watches an offloaded model write one text, or a batch. Make it before the first step."""

    def __init__(self, offloaded: OffloadedModel) -> None:
        self._offloaded = offloaded
        self._prompt: CacheStats | None = None
        self._num_held = 0
        self._mark()

    def note_first_token(self) -> None:
        """Says that the prompt is computed and writing begins."""
        self._prompt = _subtract(self._offloaded.stats, self._stats)
        self._num_held = sum(map(len, self._held.values()))
        self._mark()

    def report_text(self, stats: GenerationStats) -> RunReport:
        """Returns what a text came to, when it is written. Raises `ValueError` before its first token."""
        if self._prompt is None:
            raise ValueError("the text has no first token yet; report it when it is written")
        prompt = self._measure(stats.prompt_tokens, stats.prefill_s, self._prompt, None)
        plan, predictions = self._offloaded.plan.predicted, []
        if plan is not None:
            predictions.append(_compare("prompt", _predict_prompt(plan, stats, self._num_held), prompt))
        writing = None
        if stats.new_tokens > 1:
            writing = self._measure_since_mark(stats.new_tokens - 1, stats.decode_s)
            if plan is not None:
                position = stats.prompt_tokens + stats.new_tokens / 2
                predicted = plan.speed.predict_decode(1, position, plan.num_slots)
                predictions.append(_compare("writing", predicted, writing))
        return RunReport(prompt, writing, tuple(predictions))

    def report_batch(self, stats: BatchStats, num_texts: int) -> RunReport:
        """Returns what a batch of so many texts came to, prompts and texts together, per new token."""
        writing = self._measure_since_mark(stats.new_tokens, stats.seconds)
        plan = self._offloaded.plan.predicted
        if plan is None:
            return RunReport(None, writing, ())
        batch_size = max(1, round(stats.new_tokens / max(1, stats.num_steps)))
        position = (stats.prompt_tokens + stats.new_tokens / 2) / max(1, num_texts)
        predicted = plan.speed.predict_decode(batch_size, position, plan.num_slots)
        return RunReport(None, writing, (_compare(f"writing {batch_size} at once", predicted, writing),))

    def _mark(self) -> None:
        offloaded = self._offloaded
        self._stats = offloaded.stats
        self._held = {
            layout: [key for key in cache.sections if cache.is_ready(key)]
            for layout, cache in offloaded.caches.items()
        }
        if offloaded.tally is not None:
            offloaded.tally.clear()

    def _measure_since_mark(self, num_tokens: int, seconds: float) -> Traffic:
        stats = _subtract(self._offloaded.stats, self._stats)
        best = self._count_best_loads()
        share = None if best is None or not stats.num_loads else best / stats.num_loads
        return self._measure(num_tokens, seconds, stats, share)

    def _count_best_loads(self) -> int | None:
        """Returns the loads of Belady's rule since the mark, from what the slots held then; None where demands were not
        noted."""
        if self._offloaded.tally is None:
            return None
        layouts = self._offloaded.experts.layouts
        demands: dict[SlotLayout, list[tuple[ExpertKey, ...]]] = {layout: [] for layout in self._held}
        for demand in self._offloaded.tally.demands():
            if demand:
                demands[layouts[demand[0][0]]].append(demand)
        return sum(
            replay_best(
                [tuple(held), *demands[layout]] if held else demands[layout], self._count_slots(layout)
            ).num_loads
            - len(held)
            for layout, held in self._held.items()
        )

    def _count_slots(self, layout: SlotLayout) -> int:
        return self._offloaded.caches[layout].pool.num_slots

    def _measure(
        self, num_tokens: int, seconds: float, stats: CacheStats, policy_share: float | None
    ) -> Traffic:
        asked = stats.num_hits + stats.num_misses
        plan, num_tokens = self._offloaded.plan, max(1, num_tokens)
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
            num_guessed=stats.prefetch_issued,
            num_right=stats.prefetch_used,
            transfer_share=transfer_share,
            policy_share=policy_share,
        )


def _describe(name: str, traffic: Traffic) -> str:
    text = (
        f"{name}: {traffic.hit_rate:.0%} of expert uses found in memory, "
        f"{traffic.disk_bytes_per_token / 2**20:.1f} MiB read and {1000 * traffic.stall_s_per_token:.1f} ms waited per "
        "token"
    )
    if traffic.transfer_share is not None:
        text += f", {traffic.transfer_share:.0%} of the disk's rate"
    if traffic.precision is not None:
        text += f"; {traffic.precision:.0%} of {traffic.num_guessed} guesses were used"
    if traffic.policy_share is not None:
        text += f"; the best choice of what stays would have read {traffic.policy_share:.0%} as much"
    return text


def _encode(record: Traffic | PredictionReport) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _predict_prompt(plan: InferencePlan, stats: GenerationStats, num_held: int) -> Prediction:
    pass_tokens = min(plan.prefill_tokens, stats.prompt_tokens)
    return plan.speed.predict_prefill(stats.prompt_tokens, pass_tokens, plan.num_slots, num_held=num_held)


def _compare(kind: str, predicted: Prediction, traffic: Traffic) -> PredictionReport:
    read_bytes = round(traffic.disk_bytes_per_token * traffic.num_tokens)
    return report_prediction(kind, predicted, traffic.num_tokens, traffic.seconds, read_bytes)


def _subtract(later: CacheStats, earlier: CacheStats) -> CacheStats:
    names = [field.name for field in fields(CacheStats)]
    return CacheStats(**{name: getattr(later, name) - getattr(earlier, name) for name in names})
