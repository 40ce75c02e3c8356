"""How a model is to run within a budget: what the user asks for, and what becomes of it.

Where this machine's speed has been measured, the plan is the fastest one and says how fast; where not, it is a sound
one that promises nothing. Reads headers and the saved measurement; loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch

from moesys.checkpoint import OffloadedWeights
from moesys.errors import ConfigError, GenerationError, IneffectiveOptionError
from moesys.inference.generate import PREFILL_TOKENS
from moesys.inference.step_memory import compute_step_bytes
from moesys.models import DecoderConfig
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
from moesys.planning.plan import BATCH_SIZES, Spend
from moesys.store import PolicyName, ReadMode, find_direct_obstacle

_READERS = 4
"""Where nothing was measured: enough for the full rate of the disks that were."""


@dataclass(frozen=True)
class OffloadRequest:
    """What somebody wants of a model within a budget.

    host_memory:    a size for everything, such as ``8GiB``, or a share of the weights, such as ``50%``.
    num_positions:  tokens of a sequence at most; None for the model's full context.
    batch_size:     sequences that are open at once; None for what serves the goal.
    num_texts:      sequences that there are in all, and never more are open at once; None where that is not known.
    num_slots:      experts in memory, at most as many as the budget holds; None for as many. For tests and diagnosis.
    policy:         which expert leaves when a slot is needed.
    predicts:       whether the next layer's router is asked early, and what it names read while the disk is idle.
    verifies:       whether what is read is held against checksums.
    """

    host_memory: str
    num_positions: int | None = None
    batch_size: int | None = None
    num_texts: int | None = None
    goal: Goal = Goal.LATENCY
    num_slots: int | None = None
    policy: PolicyName = PolicyName.LRFU
    predicts: bool = False
    verifies: bool = True


@dataclass(frozen=True)
class ModelSize:
    """What of a model its memory depends on, known from headers.

    dtype: as which it is computed.
    """

    config: DecoderConfig
    dtype: torch.dtype
    footprint: Footprint

    @classmethod
    def measure(
        cls, config: DecoderConfig, dtype: torch.dtype, core_bytes: int, section_bytes: Sequence[int]
    ) -> Self:
        """core_bytes: of the weights that every token uses; section_bytes: of each expert."""
        footprint = Footprint(
            core_bytes=core_bytes,
            section_bytes=tuple(section_bytes),
            kv_bytes_per_token=compute_kv_bytes_per_token(config.mixers, dtype.itemsize),
            state_bytes=compute_state_bytes(config.mixers),
        )
        return cls(config, dtype, footprint)

    def count_step_bytes(self, num_positions: int, num_tokens: int, num_sequences: int) -> int:
        """See `compute_step_bytes`."""
        return compute_step_bytes(self.config, num_tokens, num_positions, self.dtype.itemsize, num_sequences)


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
    section_bytes = [section.num_bytes for section in weights.experts.sections.values()]
    size = ModelSize.measure(weights.config, weights.dtype, weights.resident_bytes, section_bytes)
    require_room(size, request)
    profile = find_saved_profile(path)
    if profile is None:
        plan = _plan_unmeasured(size, request, _choose_read_mode(weights))
    else:
        plan = _plan_measured(weights, size, request, profile)
    return plan if request.num_slots is None else _limit_slots(plan, request.num_slots)


def require_room(size: ModelSize, request: OffloadRequest) -> None:
    """Raises `ConfigError` for a budget that is none, and `GenerationError` with the sum for one in which a model can
    not run, whatever the plan."""
    smallest = _spend(size, request, _list_batch_sizes(request)[0])
    if not smallest.fits:
        raise GenerationError(smallest.explain(size.footprint))


def require_stored_dtype(path: Path, dtype: str | None) -> None:
    """Raises `IneffectiveOptionError` for a dtype that is asked for beside a budget."""
    if dtype is not None:
        raise IneffectiveOptionError(
            f"--dtype {dtype} has no effect with --host-memory, where experts are read as they are stored; pack the "
            f"model first: moesys pack {path} --to FILE --dtype {dtype}"
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
    """Returns how many slots the experts of each layout get: all of them, or one and the same share of the others.

    sizes: of the experts of each layout. Raises `GenerationError` where a layout would get none.
    """
    tier = plan.tier
    if len(sizes) == 1:
        return dict.fromkeys(sizes, tier.num_experts)
    first_bytes = sum(max(of_layout) for of_layout in sizes.values())
    if tier.expert_bytes < first_bytes:
        raise GenerationError(
            f"the budget holds {tier.expert_bytes} bytes of experts, which come in {len(sizes)} shapes with slots of "
            f"their own: one of each takes {first_bytes}; raise --host-memory"
        )
    other_bytes = sum(map(sum, sizes.values())) - first_bytes
    share = (tier.expert_bytes - first_bytes) / other_bytes if other_bytes else 1.0
    if plan.request.num_slots is not None:
        num_others = sum(map(len, sizes.values())) - len(sizes)
        share = min(share, (tier.num_experts - len(sizes)) / num_others if num_others else 1.0)
    return {layout: 1 + int(min(1.0, share) * (len(of_layout) - 1)) for layout, of_layout in sizes.items()}


def _plan_unmeasured(size: ModelSize, request: OffloadRequest, read_mode: ReadMode) -> OffloadPlan:
    spends = [_spend(size, request, batch_size) for batch_size in _list_batch_sizes(request)]
    largest = [spent for spent in spends if spent.fits][-1]
    return OffloadPlan(
        request,
        size.footprint,
        largest.placement.tiers[0],
        _choose_positions(size, request),
        largest.batch_size,
        largest.pass_tokens,
        read_mode,
        _READERS,
        None,
    )


def _list_batch_sizes(request: OffloadRequest) -> list[int]:
    """Returns how many sequences may be open at once, the fewest first."""
    if request.batch_size is not None:
        batch_sizes = [request.batch_size]
    else:
        batch_sizes = [1] if request.goal is Goal.LATENCY else list(BATCH_SIZES)
    if request.num_texts is None:
        return batch_sizes
    return sorted({min(batch_size, request.num_texts) for batch_size in batch_sizes})


def _choose_positions(size: ModelSize, request: OffloadRequest) -> int:
    return request.num_positions or size.config.position_limit


def _parse_budget(size: ModelSize, request: OffloadRequest) -> Budget:
    return parse_budget(request.host_memory, "--host-memory", "RAM", size.footprint.weight_bytes)


def _spend(size: ModelSize, request: OffloadRequest, batch_size: int) -> Spend:
    num_positions = _choose_positions(size, request)
    return spend(
        size.footprint,
        _parse_budget(size, request),
        num_positions=num_positions,
        batch_size=batch_size,
        pass_tokens=min(PREFILL_TOKENS, num_positions),
        step_bytes=partial(size.count_step_bytes, num_positions),
    )


def _choose_read_mode(weights: OffloadedWeights) -> ReadMode:
    """Past the page cache where that is possible: a seventh of the work for the CPU, which has other things to do."""
    files = {extent.file.path for section in weights.experts.sections.values() for extent in section.extents}
    is_refused = any(find_direct_obstacle(path) is not None for path in files)
    return ReadMode.BUFFERED if is_refused else ReadMode.DIRECT


def _plan_measured(
    weights: OffloadedWeights, size: ModelSize, request: OffloadRequest, profile: MachineProfile
) -> OffloadPlan:
    config, num_positions = size.config, _choose_positions(size, request)
    section_bytes = {layer: section.num_bytes for (layer, _), section in weights.experts.sections.items()}
    lookup_bytes = (
        0 if config.tie_embeddings else config.vocab_size * config.hidden_size * size.dtype.itemsize
    )
    plan_batch = partial(
        make_plan,
        size.footprint,
        _parse_budget(size, request),
        profile,
        num_positions=num_positions,
        active=make_activity(
            config, size.footprint, [section_bytes[i] for i in sorted(section_bytes)], lookup_bytes
        ),
        step_bytes=partial(size.count_step_bytes, num_positions),
        goal=request.goal,
    )
    batch_sizes = _list_batch_sizes(request)
    predicted = plan_batch(batch_size=batch_sizes[0] if len(batch_sizes) == 1 else None)
    if predicted.batch_size > batch_sizes[-1]:
        predicted = plan_batch(batch_size=batch_sizes[-1])
    return OffloadPlan(
        request,
        size.footprint,
        predicted.tier,
        num_positions,
        predicted.batch_size,
        predicted.prefill_tokens,
        predicted.read_mode,
        predicted.num_readers,
        predicted,
    )


def _limit_slots(plan: OffloadPlan, num_slots: int) -> OffloadPlan:
    least = plan.footprint.num_shapes
    if not least <= num_slots <= plan.tier.num_experts:
        raise GenerationError(
            f"num_slots ({num_slots}) must be {least} to {plan.tier.num_experts}, from one for each shape of experts "
            "to as many as the budget holds; raise the budget or leave it out"
        )
    tier = replace(plan.tier, num_experts=num_slots, expert_bytes=num_slots * plan.footprint.slot_bytes)
    # What was predicted is of another number of slots.
    return replace(plan, tier=tier, predicted=None)
