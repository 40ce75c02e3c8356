"""How a model is run within a budget: what is where, in which passes, how the disk is read, and how fast that will be.

A pure function of a model's needs, a budget and a machine's measured rates. Every way to spend the budget is predicted,
and the fastest taken. Knows nothing of how a plan is carried out; what a step takes in memory it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from moesys.errors import GenerationError
from moesys.planning.activity import Activity
from moesys.planning.budget import Budget
from moesys.planning.footprint import Footprint, round_to_pages
from moesys.planning.machine_profile import MachineProfile
from moesys.planning.miss_rates import MissRates, UniformMisses
from moesys.planning.placement import Placement, TierPlacement, compute_reserve, place
from moesys.planning.speed import Prediction, SpeedModel
from moesys.store import ReadMode
from moesys.units import format_bytes, format_rate

PASS_TOKENS = (512, 1024, 2048, 4096)
"""Tokens of a prompt that a pass may take: from where products run at their full rate to where a pass over the disk
costs little per token."""

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
"""Sequences that may be open at once, where throughput is the goal."""

MIN_SLOTS = 2
"""One to compute from while the next is filled. Experts of more shapes than this need a slot for each shape."""

_TYPICAL_PROMPT_TOKENS = 2048
_TYPICAL_NEW_TOKENS = 128


StepBytes = Callable[[int, int], int]
"""From the new tokens of a step and the sequences that they belong to, to bytes."""


class Goal(StrEnum):
    """What a plan is good at."""

    LATENCY = "latency"
    """One sequence, written as soon as possible."""
    THROUGHPUT = "throughput"
    """Many sequences, all of them written as soon as possible."""


class StepMode(StrEnum):
    """Where a kind of step finds its experts."""

    RESIDENT = "resident"
    """All of them stay in memory once they were read."""
    RING = "ring"
    """They come from the disk in the order of the layers, read ahead, for a step that needs most of them."""
    CACHE = "cache"
    """Those that the last tokens needed are in memory; others are read when they are needed."""


@dataclass(frozen=True)
class Workload:
    """What a sequence is expected to be, for choosing between plans."""

    prompt_tokens: int
    new_tokens: int

    @classmethod
    def guess(cls, num_positions: int) -> Workload:
        """Returns a long prompt and an answer of 128 tokens, or what positions there are for."""
        new_tokens = min(_TYPICAL_NEW_TOKENS, max(1, num_positions // 2))
        return cls(max(1, min(_TYPICAL_PROMPT_TOKENS, num_positions - new_tokens)), new_tokens)


@dataclass(frozen=True)
class InferencePlan:
    """A way to run a model.

    prefill_tokens:  of a prompt in one pass, at most.
    batch_size:      sequences that are open at once, of at most ``num_positions`` tokens each.
    num_slots:       experts in memory, of all layers.
    prefill:         of the first prompts of ``workload``, for which the experts that they need are read.
    decode:          of a step in the middle of the answers.
    """

    goal: Goal
    placement: Placement
    prefill_mode: StepMode
    decode_mode: StepMode
    prefill_tokens: int
    batch_size: int
    num_positions: int
    num_slots: int
    workload: Workload
    prefill: Prediction
    decode: Prediction
    speed: SpeedModel

    @property
    def tier(self) -> TierPlacement:
        """How the memory is spent."""
        return self.placement.tiers[0]

    @property
    def read_mode(self) -> ReadMode:
        """How experts are read."""
        return self.speed.way.mode

    @property
    def num_readers(self) -> int:
        """Threads that read them."""
        return self.speed.way.depth

    @property
    def seconds(self) -> float:
        """Predicted for all sequences of the batch, prompts and answers."""
        return self.prefill.seconds + self.workload.new_tokens * self.decode.seconds

    @property
    def seconds_per_sequence(self) -> float:
        return self.seconds / self.batch_size

    def describe(self) -> str:
        """One line for people: how it runs and how fast that will be."""
        kept = f"{self.num_slots} of {self.speed.activity.num_experts} experts in memory"
        return (
            f"plan: {kept}, a first prompt of {self.workload.prompt_tokens} tokens {self.prefill_mode} in passes of "
            f"{self.prefill_tokens} at about {format_rate(self.prefill.tokens_per_s)} tokens/s, writing "
            f"{self.decode_mode} at about {describe_rate(self.decode)}"
        )


def make_plan(
    footprint: Footprint,
    budget: Budget,
    profile: MachineProfile,
    *,
    num_positions: int,
    active: Activity,
    step_bytes: StepBytes,
    goal: Goal = Goal.LATENCY,
    batch_size: int | None = None,
    misses: MissRates | None = None,
    workload: Workload | None = None,
    loads_first: bool = False,
) -> InferencePlan:
    """Returns the fastest plan that keeps the budget.

    num_positions:  tokens of a sequence at most.
    active:         what a token makes of the model.
    step_bytes:     what computing a step takes in memory.
    batch_size:     sequences that are open at once; None for what serves the goal: one for latency, up to 32 for
                    throughput.
    misses:         None assumes that all experts are needed equally often.
    workload:       None for a long prompt and a short answer.
    loads_first:    whether a model that fits is loaded before the first prompt, as it is where no budget is given.

    Raises `GenerationError` with the sum where the budget does not hold the least that is needed.
    """
    workload = workload or Workload.guess(num_positions)
    speeds = [
        SpeedModel(
            profile,
            way,
            active,
            misses or UniformMisses(active.num_experts),
            footprint.kv_bytes_per_token,
            footprint.slot_bytes,
        )
        for way in profile.reads
    ]
    batch_sizes = [batch_size] if batch_size is not None else [1] if goal is Goal.LATENCY else BATCH_SIZES
    spends = list(_list_spends(footprint, budget, num_positions, batch_sizes, step_bytes))
    plans = [
        _predict(spend, speed, goal, num_positions, workload, loads_first=loads_first)
        for spend in spends
        if spend.fits
        for speed in speeds
    ]
    if not plans:
        raise GenerationError(spends[0].explain(footprint))
    # min takes the first of equals: the smaller batch and pass, the fewer readers.
    return min(plans, key=lambda plan: plan.seconds_per_sequence)


def describe_rate(prediction: Prediction) -> str:
    """Returns tokens per second, as a range where misses were assumed."""
    return f"{format_range(prediction.tokens_per_s, prediction.tokens_per_s_if_skewed)} tokens/s"


def format_range(low: float, high: float) -> str:
    """Returns two numbers to three digits, one where they are the same."""
    first, last = format_rate(low), format_rate(high)
    return first if first == last else f"{first} to {last}"


@dataclass(frozen=True)
class Spend:
    """A way to spend a budget, fitting or not.

    least_slots: to run at all; 0 without experts.
    """

    budget: Budget
    placement: Placement
    pass_tokens: int
    batch_size: int
    least_slots: int

    @property
    def fits(self) -> bool:
        """Whether all that has to be in memory is."""
        tier = self.placement.tiers[0]
        return not tier.missing_bytes and tier.num_experts >= self.least_slots

    def explain(self, footprint: Footprint) -> str:
        """Returns the inequality that failed, with its numbers, for one that does not fit."""
        tier, budget = self.placement.tiers[0], self.budget
        needed = {"resident weights": tier.core_bytes}
        if self.least_slots:
            needed[f"{self.least_slots} experts"] = self.least_slots * footprint.slot_bytes
        if not budget.is_share:
            tokens = self.placement.context_tokens
            needed[f"keys and values of {tokens} tokens"] = tier.kv_bytes
            needed[f"a pass of {self.pass_tokens} tokens"] = tier.step_bytes
            needed["a reserve"] = compute_reserve(sum(list(needed.values())[:2]))
        parts = " + ".join(f"{name} {format_bytes(size)}" for name, size in needed.items())
        total = f" = {format_bytes(sum(needed.values()))}" if len(needed) > 1 else ""
        fewer = f", or open fewer than {self.batch_size} sequences at once" if self.batch_size > 1 else ""
        return f"--host-memory {format_bytes(budget.size_bytes)} is less than {parts}{total}; raise it{fewer}"


def spend(
    footprint: Footprint,
    budget: Budget,
    *,
    num_positions: int,
    batch_size: int,
    pass_tokens: int,
    step_bytes: StepBytes,
) -> Spend:
    """Returns what a budget holds beside the keys and values of a batch and the largest step."""
    tokens = batch_size * round_to_pages(num_positions)
    placement = place(
        footprint, [budget], tokens, step_bytes(pass_tokens + batch_size - 1, batch_size), batch_size
    )
    least_slots = min(max(MIN_SLOTS, footprint.num_shapes), len(footprint.section_bytes))
    return Spend(budget, placement, pass_tokens, batch_size, least_slots)


def _list_spends(
    footprint: Footprint,
    budget: Budget,
    num_positions: int,
    batch_sizes: Sequence[int],
    step_bytes: StepBytes,
) -> Iterator[Spend]:
    """Yields every way that is considered, the one that needs least first."""
    for batch_size in batch_sizes:
        for pass_tokens in sorted({min(tokens, num_positions) for tokens in PASS_TOKENS}):
            yield spend(
                footprint,
                budget,
                num_positions=num_positions,
                batch_size=batch_size,
                pass_tokens=pass_tokens,
                step_bytes=step_bytes,
            )


def _predict(
    spend: Spend, speed: SpeedModel, goal: Goal, num_positions: int, workload: Workload, *, loads_first: bool
) -> InferencePlan:
    placement, num_slots = spend.placement, spend.placement.tiers[0].num_experts
    is_resident = placement.is_resident
    decode_mode = StepMode.RING if speed.activity.is_pass(spend.batch_size) else StepMode.CACHE
    position = workload.prompt_tokens + workload.new_tokens / 2
    return InferencePlan(
        goal=goal,
        placement=placement,
        prefill_mode=StepMode.RESIDENT if is_resident else StepMode.RING,
        decode_mode=StepMode.RESIDENT if is_resident else decode_mode,
        prefill_tokens=spend.pass_tokens,
        batch_size=spend.batch_size,
        num_positions=num_positions,
        num_slots=num_slots,
        workload=workload,
        prefill=speed.predict_prefill(
            workload.prompt_tokens,
            spend.pass_tokens,
            num_slots,
            num_prompts=spend.batch_size,
            num_held=num_slots if is_resident and loads_first else 0,
        ),
        decode=speed.predict_decode(spend.batch_size, position, num_slots),
        speed=speed,
    )
