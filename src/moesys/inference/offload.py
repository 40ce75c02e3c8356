"""A model within a budget of memory: what every token uses is resident, experts share the slots that are left.

How a budget is spent is `moesys.planning`'s arithmetic; this carries it out: it allocates the slots and puts a cache of
experts behind the expert-source seam. The model and the kernels are those of a resident run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moesys.checkpoint import OffloadedWeights, open_offloaded
from moesys.errors import GenerationError
from moesys.models import Block, Decoder
from moesys.moe import CachedLayer, CachedSource, Execution, ExpertBank, LocalDispatcher, MoELayer
from moesys.planning import Budget, Footprint, TierPlacement, compute_kv_bytes_per_token, parse_budget, place
from moesys.store import LeastRecent, PartShape, SectionCache, SectionReader, SlotPool
from moesys.units import format_bytes

_MIN_SLOTS = 2
"""One to compute from while the next is filled."""


@dataclass(frozen=True)
class OffloadedModel:
    """A model whose experts come and go, ready for an `Engine`.

    tier:         how the memory is spent.
    num_experts:  of all layers; ``cache.pool.num_slots`` of them are in memory.
    """

    model: Decoder
    execution: Execution
    tier: TierPlacement
    cache: SectionCache
    num_experts: int

    def describe_plan(self) -> str:
        """One line for people: what is where."""
        slots = self.cache.pool.num_slots
        return (
            f"{format_bytes(self.tier.core_bytes)} of weights resident, {slots} of {self.num_experts} experts "
            f"({slots / self.num_experts:.0%}, {format_bytes(self.cache.pool.num_bytes)}) kept in memory, "
            f"{format_bytes(self.tier.kv_bytes)} for keys and values"
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
    folder: Path, host_memory: str, *, num_positions: int | None = None, num_slots: int | None = None
) -> Iterator[OffloadedModel]:
    """Loads a model folder within a budget; its files stay open inside.

    host_memory:    a size for everything, such as ``8GiB``, or a share of the weights, such as ``50%``.
    num_positions:  tokens of the sequences that will be open at once; None for one of the model's full context.
    num_slots:      experts in memory; None for as many as the budget holds.

    Raises `ModelFormatError` for a folder whose experts cannot be read one by one, `ConfigError` for a budget that is
    none, and `GenerationError` for one that is too small.
    """
    with open_offloaded(folder) as weights, SectionReader() as reader:
        footprint = _measure_footprint(weights)
        budget = parse_budget(host_memory, "--host-memory", "RAM", footprint.weight_bytes)
        if num_positions is None:
            num_positions = weights.model.config.position_limit
        tier = _spend(budget, footprint, num_positions)
        pool = SlotPool(tier.num_experts if num_slots is None else num_slots, _find_slot_shape(weights))
        cache = SectionCache(pool, weights.experts.sections, reader, LeastRecent())
        layers = {
            layer_id: CachedLayer(cache, bank.down_EDF.shape[0], bank.form)
            for layer_id, bank in _list_banks(weights.model)
        }
        execution = Execution(LocalDispatcher(), CachedSource(layers))
        yield OffloadedModel(weights.model, execution, tier, cache, len(weights.experts.sections))


def _measure_footprint(weights: OffloadedWeights) -> Footprint:
    return Footprint(
        core_bytes=weights.resident_bytes,
        section_bytes=tuple(section.num_bytes for section in weights.experts.sections.values()),
        kv_bytes_per_token=compute_kv_bytes_per_token(
            weights.model.config.mixers, weights.model.embedding.weight.itemsize
        ),
    )


def _spend(budget: Budget, footprint: Footprint, num_positions: int) -> TierPlacement:
    (tier,) = place(footprint, [budget], num_positions).tiers
    if tier.missing_bytes or tier.num_experts < _MIN_SLOTS:
        needed = {
            "resident weights": tier.core_bytes,
            f"{_MIN_SLOTS} experts": _MIN_SLOTS * footprint.slot_bytes,
        }
        if not budget.is_share:
            needed[f"keys and values of {num_positions} tokens"] = tier.kv_bytes
            needed["a reserve"] = tier.reserve_bytes
        parts = " + ".join(f"{name} {format_bytes(size)}" for name, size in needed.items())
        raise GenerationError(
            f"--host-memory {format_bytes(budget.size_bytes)} is less than {parts} = "
            f"{format_bytes(sum(needed.values()))}; raise it"
        )
    return tier


def _find_slot_shape(weights: OffloadedWeights) -> tuple[PartShape, ...]:
    shapes = set(weights.experts.shapes.values())
    if len(shapes) > 1:
        raise GenerationError(
            f"experts of {len(shapes)} shapes cannot share slots; run this model without --host-memory"
        )
    return shapes.pop()


def _list_banks(model: Decoder) -> Iterator[tuple[int, ExpertBank]]:
    for layer_id, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if isinstance(block.feed_forward, MoELayer):
            assert isinstance(block.feed_forward.experts, ExpertBank)
            yield layer_id, block.feed_forward.experts
