"""How fast a model runs on a machine with so many experts in memory: predictions for prompts of any length and for
batches of any size, each beside the bound that it cannot pass.

Joins a machine's rates with a model's activity; which of the possible speeds is chosen is the plan's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesys.planning.activity import Activity
from moesys.planning.cost import (
    Bound,
    BoundTimes,
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
from moesys.planning.machine_profile import MachineProfile, ReadWay
from moesys.planning.miss_rates import SKEWED_SHARE, MissRates


@dataclass(frozen=True)
class Prediction:
    """Of a number of tokens that are computed together: a step of decoding, or a whole prompt.

    seconds:           with as many misses as are assumed or were counted.
    bound_times:       what the machine's best rates allow then.
    ..._if_skewed:     with the fewer misses of routing that prefers some experts; the same where misses were counted,
                       or do not matter.
    disk_bytes_per_s:  the best rate of the disk.
    """

    num_tokens: int
    seconds: float
    seconds_if_skewed: float
    bound_times: BoundTimes
    bound_times_if_skewed: BoundTimes
    disk_bytes_per_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def tokens_per_s_if_skewed(self) -> float:
        return self.num_tokens / self.seconds_if_skewed

    @property
    def bound(self) -> Bound:
        return self.bound_times.bound

    @property
    def bound_tokens_per_s(self) -> float:
        return self.num_tokens / self.bound_times.seconds

    @property
    def bound_tokens_per_s_if_skewed(self) -> float:
        return self.num_tokens / self.bound_times_if_skewed.seconds


@dataclass(frozen=True)
class SpeedModel:
    """A model on a machine.

    way:            how experts are read.
    section_bytes:  of an expert on the disk; 0 without experts.
    """

    profile: MachineProfile
    way: ReadWay
    activity: Activity
    misses: MissRates
    kv_bytes_per_token: int
    section_bytes: int

    def predict_decode(self, batch_size: int, position: float, num_slots: int) -> Prediction:
        """Predicts a step of one new token for each of ``batch_size`` sequences that are ``position`` tokens long.

        Where experts come from the disk and the sequences together need most of them, each step is a pass over all.
        """
        if num_slots < self.activity.num_experts and self.activity.is_pass(batch_size):
            work = self._make_decode_work(batch_size, position, self._find_missing_share(num_slots))
            return self._predict_passes(batch_size, [work])
        rate = self._find_miss_rate(num_slots)
        work = self._make_decode_work(batch_size, position, rate)
        skewed = work
        if self.misses.is_assumed:
            skewed = self._make_decode_work(batch_size, position, SKEWED_SHARE * rate)
        rates = find_kernel_rates(
            self.profile, self.activity.weight_format, self.way, max(self.section_bytes, 1)
        )
        return Prediction(
            num_tokens=batch_size,
            seconds=compute_decode_seconds(work, self.activity, rates),
            seconds_if_skewed=compute_decode_seconds(skewed, self.activity, rates),
            bound_times=compute_bound(work, self._ceilings),
            bound_times_if_skewed=compute_bound(skewed, self._ceilings),
            disk_bytes_per_s=self._ceilings.disk_bytes_per_s,
        )

    def predict_prefill(
        self,
        prompt_tokens: int,
        pass_tokens: int,
        num_slots: int,
        *,
        num_prompts: int = 1,
        num_held: int = 0,
    ) -> Prediction:
        """Predicts ``num_prompts`` prompts of so many tokens each, one after the other, in passes of at most
        ``pass_tokens`` of all of them. A token attends to its own prompt only.

        num_held:  experts that are in memory before the first pass. It reads the others that it needs, however many
                   slots there are; each later one finds those that the slots hold, in whatever order they are needed.
        """
        works = self._list_passes(prompt_tokens, num_prompts, pass_tokens, num_slots, num_held)
        return self._predict_passes(num_prompts * prompt_tokens, works)

    def _predict_passes(self, num_tokens: int, works: Sequence[StepWork]) -> Prediction:
        alone = find_stream_rates(
            self.profile, self.activity.weight_format, self.way, max(self.section_bytes, 1)
        )
        overlapped = slow_down(alone, self.profile)
        seconds = sum(compute_pass_seconds(work, self.activity, alone, overlapped) for work in works)
        bounds = [compute_bound(work, self._ceilings) for work in works]
        bound_times = BoundTimes(
            memory_s=sum(times.memory_s for times in bounds),
            disk_s=sum(times.disk_s for times in bounds),
            arithmetic_s=sum(times.arithmetic_s for times in bounds),
        )
        return Prediction(
            num_tokens=num_tokens,
            seconds=seconds,
            seconds_if_skewed=seconds,
            bound_times=bound_times,
            bound_times_if_skewed=bound_times,
            disk_bytes_per_s=self._ceilings.disk_bytes_per_s,
        )

    @property
    def _ceilings(self) -> StepRates:
        return find_ceilings(self.profile, self.activity.weight_format)

    def _find_missing_share(self, num_held: int) -> float:
        """Returns what of its experts a pass reads while memory holds so many."""
        num_experts = self.activity.num_experts
        return max(0.0, 1 - num_held / num_experts) if num_experts else 0.0

    def _find_miss_rate(self, num_slots: int) -> float:
        return 0.0 if num_slots >= self.activity.num_experts else self.misses.find_rate(num_slots)

    def _make_decode_work(self, batch_size: int, position: float, miss_rate: float) -> StepWork:
        activity = self.activity
        expert_bytes = activity.count_expert_bytes(batch_size)
        return StepWork(
            num_tokens=batch_size,
            core_bytes=activity.core_bytes,
            core_flops=batch_size * (activity.core_flops + activity.head_flops),
            expert_bytes=expert_bytes,
            expert_flops=activity.count_expert_flops(batch_size),
            missed_bytes=miss_rate * expert_bytes,
            kv_bytes=batch_size * position * self.kv_bytes_per_token,
            attention_flops=activity.count_attention_flops(batch_size, max(1, round(2 * position))),
        )

    def _list_passes(
        self, prompt_tokens: int, num_prompts: int, pass_tokens: int, num_slots: int, num_held: int
    ) -> list[StepWork]:
        activity, num_tokens = self.activity, num_prompts * prompt_tokens
        prompt_flops = activity.count_attention_flops(prompt_tokens, prompt_tokens)
        works = []
        for start in range(0, num_tokens, pass_tokens):
            count = min(pass_tokens, num_tokens - start)
            expert_bytes = activity.count_expert_bytes(count)
            missing_share = self._find_missing_share(num_slots if start else num_held)
            works.append(
                StepWork(
                    num_tokens=count,
                    core_bytes=activity.core_bytes,
                    core_flops=count * activity.core_flops + activity.head_flops,
                    expert_bytes=expert_bytes,
                    expert_flops=activity.count_expert_flops(count),
                    missed_bytes=missing_share * expert_bytes,
                    kv_bytes=_count_context(start, count, prompt_tokens) * self.kv_bytes_per_token,
                    attention_flops=prompt_flops * count / prompt_tokens,
                )
            )
        return works


def _count_context(start: int, num_tokens: int, prompt_tokens: int) -> int:
    """Returns the tokens whose keys a pass reads that computes ``num_tokens`` tokens from ``start`` on of prompts that
    lie end to end: of each of its prompts, those up to the last one computed."""
    end = start + num_tokens
    first, last = start // prompt_tokens, (end - 1) // prompt_tokens
    return (last - first) * prompt_tokens + end - last * prompt_tokens
