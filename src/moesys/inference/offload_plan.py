"""How a model is to run within a budget: what the user asks for, and what becomes of it.

Where this machine's speed has been measured, the plan is the fastest one and says how fast; where not, it is a sound
one that promises nothing. Reads headers and the saved measurement; loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moesys.checkpoint import OffloadedWeights
from moesys.errors import ConfigError, GenerationError
from moesys.inference.generate import PREFILL_TOKENS
from moesys.inference.step_memory import compute_step_bytes
from moesys.moe import SlotLayout
from moesys.planning import (
    Budget,
    Footprint,
    Goal,
    InferencePlan,
    MachineProfile,
    TierPlacement,
    compute_kv_bytes_per_token,
    compute_state_bytes,
    find_profile,
    find_profile_path,
    make_activity,
    make_plan,
    parse_budget,
    read_disk,
    read_machine,
    read_profiles,
    spend,
)
from moesys.store import PolicyName, ReadMode, find_direct_obstacle

_READERS = 4
"""Where nothing was measured: enough for the full rate of the disks that were."""


@dataclass(frozen=True)
class OffloadRequest:
    """What somebody wants of a model within a budget.

    host_memory:    a size for everything, such as ``8GiB``, or a share of the weights, such as ``50%``.
    num_positions:  tokens of a sequence at most; None for the model's full context.
    batch_size:     sequences that are open at once; None for what serves the goal.
    num_slots:      experts in memory, at most as many as the budget holds; None for as many. For tests and diagnosis.
    policy:         which expert leaves when a slot is needed.
    predicts:       whether the next layer's router is asked early, and what it names read while the disk is idle.
    verifies:       whether what is read is held against checksums.
    """

    host_memory: str
    num_positions: int | None = None
    batch_size: int | None = None
    goal: Goal = Goal.LATENCY
    num_slots: int | None = None
    policy: PolicyName = PolicyName.LRFU
    predicts: bool = False
    verifies: bool = True


@dataclass(frozen=True)
class OffloadPlan:
    """What is done about a request.

    tier:            how the memory is spent.
    prefill_tokens:  of a prompt in one pass, at most.
    predicted:       the plan with its forecast; None where this machine was not measured.
    """

    request: OffloadRequest
    footprint: Footprint
    tier: TierPlacement
    num_positions: int
    batch_size: int
    prefill_tokens: int
    read_mode: ReadMode
    num_readers: int
    predicted: InferencePlan | None


def plan_offload(path: Path, weights: OffloadedWeights, request: OffloadRequest) -> OffloadPlan:
    """Returns the plan for a model that was opened from ``path``.

    Raises `ConfigError` for a budget that is none, and `GenerationError` for one that is too small, or for more slots
    than it holds.
    """
    footprint = measure_footprint(weights)
    budget = parse_budget(request.host_memory, "--host-memory", "RAM", footprint.weight_bytes)
    num_positions = request.num_positions or weights.config.position_limit
    profile = find_saved_profile(path)
    if profile is None:
        plan = _plan_unmeasured(weights, request, footprint, budget, num_positions)
    else:
        plan = _plan_measured(weights, request, footprint, budget, num_positions, profile)
    return plan if request.num_slots is None else _limit_slots(plan, request.num_slots)


def measure_footprint(weights: OffloadedWeights) -> Footprint:
    """Returns what a model needs in memory."""
    mixers = weights.config.mixers
    return Footprint(
        core_bytes=weights.resident_bytes,
        section_bytes=tuple(section.num_bytes for section in weights.experts.sections.values()),
        kv_bytes_per_token=compute_kv_bytes_per_token(mixers, weights.dtype.itemsize),
        state_bytes=compute_state_bytes(mixers),
    )


def find_saved_profile(path: Path) -> MachineProfile | None:
    """Returns what ``moesys doctor`` measured of this machine and the disk of ``path``; None where it did not."""
    try:
        profiles = read_profiles(find_profile_path())
    except ConfigError:
        # Whoever asks for a forecast is told of a broken file; a run does without.
        return None
    return find_profile(profiles, read_machine(), read_disk(path))


def divide_slots(plan: OffloadPlan, sizes: dict[SlotLayout, list[int]]) -> dict[SlotLayout, int]:
    """Returns how many slots the experts of each layout get: all of them, or the same share of their bytes.

    sizes: of the experts of each layout. Raises `GenerationError` where a layout would get none.
    """
    tier, total = plan.tier, sum(map(sum, sizes.values()))
    if len(sizes) == 1:
        return dict.fromkeys(sizes, tier.num_experts)
    share = min(1.0, tier.expert_bytes / total)
    slots = {layout: int(share * len(of_layout)) for layout, of_layout in sizes.items()}
    if not all(slots.values()):
        raise GenerationError(
            f"the budget holds {share:.1%} of the experts, which come in {len(sizes)} shapes with slots of their own: "
            "not one expert of each; raise --host-memory"
        )
    return slots


def _plan_unmeasured(
    weights: OffloadedWeights,
    request: OffloadRequest,
    footprint: Footprint,
    budget: Budget,
    num_positions: int,
) -> OffloadPlan:
    batch_size = request.batch_size or 1
    spent = spend(
        footprint,
        budget,
        num_positions=num_positions,
        batch_size=batch_size,
        pass_tokens=min(PREFILL_TOKENS, num_positions),
        step_bytes=partial(_count_step_bytes, weights, num_positions),
    )
    if not spent.fits:
        raise GenerationError(spent.explain(footprint))
    return OffloadPlan(
        request,
        footprint,
        spent.placement.tiers[0],
        num_positions,
        batch_size,
        spent.pass_tokens,
        _choose_read_mode(weights),
        _READERS,
        None,
    )


def _choose_read_mode(weights: OffloadedWeights) -> ReadMode:
    """Past the page cache where that is possible: a seventh of the work for the CPU, which has other things to do."""
    files = {extent.file.path for section in weights.experts.sections.values() for extent in section.extents}
    is_refused = any(find_direct_obstacle(path) is not None for path in files)
    return ReadMode.BUFFERED if is_refused else ReadMode.DIRECT


def _plan_measured(
    weights: OffloadedWeights,
    request: OffloadRequest,
    footprint: Footprint,
    budget: Budget,
    num_positions: int,
    profile: MachineProfile,
) -> OffloadPlan:
    config = weights.config
    section_bytes = {layer: section.num_bytes for (layer, _), section in weights.experts.sections.items()}
    lookup_bytes = (
        0 if config.tie_embeddings else config.vocab_size * config.hidden_size * weights.dtype.itemsize
    )
    predicted = make_plan(
        footprint,
        budget,
        profile,
        num_positions=num_positions,
        active=make_activity(
            config, footprint, [section_bytes[i] for i in sorted(section_bytes)], lookup_bytes
        ),
        step_bytes=partial(_count_step_bytes, weights, num_positions),
        goal=request.goal,
        batch_size=request.batch_size,
    )
    return OffloadPlan(
        request,
        footprint,
        predicted.tier,
        num_positions,
        predicted.batch_size,
        predicted.prefill_tokens,
        predicted.read_mode,
        predicted.num_readers,
        predicted,
    )


def _count_step_bytes(
    weights: OffloadedWeights, num_positions: int, num_tokens: int, num_sequences: int
) -> int:
    return compute_step_bytes(
        weights.config, num_tokens, num_positions, weights.dtype.itemsize, num_sequences
    )


def _limit_slots(plan: OffloadPlan, num_slots: int) -> OffloadPlan:
    if not 1 <= num_slots <= plan.tier.num_experts:
        raise GenerationError(
            f"num_slots ({num_slots}) must be 1 to {plan.tier.num_experts}, as many experts as the budget holds; raise "
            "the budget or leave it out"
        )
    tier = replace(plan.tier, num_experts=num_slots, expert_bytes=num_slots * plan.footprint.slot_bytes)
    # What was predicted is of another number of slots.
    return replace(plan, tier=tier, predicted=None)
