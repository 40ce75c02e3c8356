"""A model within a budget of memory: what every token uses is resident, experts share the slots that are left.

How a budget is spent is `moesys.planning`'s arithmetic; this carries it out: it allocates the slots and puts a cache of
experts behind the expert-source seam. The model and the kernels are those of a resident run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from moesys.checkpoint import OffloadedWeights, list_banks, open_offloaded
from moesys.errors import GenerationError
from moesys.inference.generate import PREFILL_TOKENS
from moesys.inference.step_memory import compute_step_bytes
from moesys.models import Decoder
from moesys.moe import CachedLayer, CachedSource, Execution, LocalDispatcher, SlotLayout
from moesys.planning import Budget, Footprint, TierPlacement, compute_kv_bytes_per_token, parse_budget, place
from moesys.store import LeastRecent, SectionCache, SectionReader, SlotPool
from moesys.units import format_bytes

_MIN_SLOTS = 2
"""One to compute from while the next is filled."""


@dataclass(frozen=True)
class OffloadedModel:
    """A model whose experts come and go, ready for an `Engine`.

    tier:         how the memory is spent.
    step_bytes:   of it, or beside it where the budget is a share, for what a pass over ``PREFILL_TOKENS`` computes.
    num_experts:  of all layers; ``tier.num_experts`` of them are in memory.
    """

    model: Decoder
    execution: Execution
    tier: TierPlacement
    step_bytes: int
    cache: SectionCache
    num_experts: int

    def describe_plan(self) -> str:
        """One line for people: what is where."""
        slots = self.tier.num_experts
        return (
            f"{format_bytes(self.tier.core_bytes)} of weights resident, {slots} of {self.num_experts} experts "
            f"({slots / self.num_experts:.0%}, {format_bytes(self.tier.expert_bytes)}) kept in memory, "
            f"{format_bytes(self.tier.kv_bytes)} for keys and values, {format_bytes(self.step_bytes)} for a pass of "
            f"{PREFILL_TOKENS} tokens"
        )

    def describe_traffic(self) -> str:
        """One line for people: what the cache did so far."""
        stats = self.cache.stats
        asked = stats.num_hits + stats.num_misses
        return (
            f"{stats.num_hits / max(asked, 1):.0%} of {asked} expert uses found in memory, "
            f"{format_bytes(stats.loaded_bytes)} read from the disk in {stats.num_loads} experts, "
            f"{stats.num_wasted} of them never used"
        )


@contextmanager
def load_offloaded(
    folder: Path,
    host_memory: str,
    *,
    num_positions: int | None = None,
    num_slots: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[OffloadedModel]:
    """Loads a model folder within a budget; its files stay open inside, and outside it computes no more.

    host_memory:    a size for everything, such as ``8GiB``, or a share of the weights, such as ``50%``.
    num_positions:  tokens of the sequences that will be open at once; None for one of the model's full context.
    num_slots:      experts in memory, at most as many as the budget holds; None for as many. For tests and diagnosis.
    on_progress:    gets (bytes read, bytes to read), of what stays in memory.

    Raises `ModelFormatError` for a folder whose experts cannot be read one by one, `ConfigError` for a budget that is
    none, and `GenerationError` for one that is too small or a number of slots beyond it; nothing is loaded then.
    """
    with open_offloaded(folder) as weights, SectionReader() as reader:
        footprint = _measure_footprint(weights)
        budget = parse_budget(host_memory, "--host-memory", "RAM", footprint.weight_bytes)
        if num_positions is None:
            num_positions = weights.config.position_limit
        step_bytes = compute_step_bytes(
            weights.config, min(PREFILL_TOKENS, num_positions), num_positions, weights.dtype.itemsize
        )
        tier = _spend(budget, footprint, num_positions, step_bytes)
        if num_slots is not None:
            tier = _limit_slots(tier, num_slots, footprint)
        pool = SlotPool(tier.num_experts, _find_layout(weights).part_shapes)
        model = weights.load_resident(on_progress)
        cache = SectionCache(pool, weights.experts.sections, reader, LeastRecent())
        layers = {
            layer_id: CachedLayer(cache, bank.down_EDF.shape[0], weights.experts.layouts[layer_id])
            for layer_id, bank in list_banks(model)
        }
        execution = Execution(LocalDispatcher(), CachedSource(layers))
        yield OffloadedModel(model, execution, tier, step_bytes, cache, len(weights.experts.sections))


def _measure_footprint(weights: OffloadedWeights) -> Footprint:
    return Footprint(
        core_bytes=weights.resident_bytes,
        section_bytes=tuple(section.num_bytes for section in weights.experts.sections.values()),
        kv_bytes_per_token=compute_kv_bytes_per_token(weights.config.mixers, weights.dtype.itemsize),
    )


def _spend(budget: Budget, footprint: Footprint, num_positions: int, step_bytes: int) -> TierPlacement:
    left = budget if budget.is_share else replace(budget, size_bytes=budget.size_bytes - step_bytes)
    (tier,) = place(footprint, [left], num_positions).tiers
    if tier.missing_bytes or tier.num_experts < _MIN_SLOTS:
        needed = {
            "resident weights": tier.core_bytes,
            f"{_MIN_SLOTS} experts": _MIN_SLOTS * footprint.slot_bytes,
        }
        if not budget.is_share:
            needed[f"keys and values of {num_positions} tokens"] = tier.kv_bytes
            needed["a pass of the prompt"] = step_bytes
            needed["a reserve"] = tier.reserve_bytes
        parts = " + ".join(f"{name} {format_bytes(size)}" for name, size in needed.items())
        raise GenerationError(
            f"--host-memory {format_bytes(budget.size_bytes)} is less than {parts} = "
            f"{format_bytes(sum(needed.values()))}; raise it"
        )
    return replace(tier, budget=budget)


def _limit_slots(tier: TierPlacement, num_slots: int, footprint: Footprint) -> TierPlacement:
    if not 1 <= num_slots <= tier.num_experts:
        raise GenerationError(
            f"num_slots ({num_slots}) must be 1 to {tier.num_experts}, as many experts as the budget holds; raise the "
            "budget or leave it out"
        )
    return replace(tier, num_experts=num_slots, expert_bytes=num_slots * footprint.slot_bytes)


def _find_layout(weights: OffloadedWeights) -> SlotLayout:
    layouts = set(weights.experts.layouts.values())
    if len(layouts) > 1:
        raise GenerationError(
            f"experts of {len(layouts)} shapes cannot share slots; run this model without --host-memory"
        )
    return layouts.pop()
