"""A model within a budget of memory: what every token uses is resident, experts share the slots that are left.

The plan is arithmetic on sizes: the budget, less the resident weights, the key/value cache and a reserve for
activations and libraries, is cut into slots of one expert. Impossible budgets are refused with that sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moesys.checkpoint import OffloadedWeights, open_offloaded
from moesys.errors import GenerationError
from moesys.models import Block, Decoder
from moesys.moe import CachedLayer, CachedSource, Execution, ExpertBank, LocalDispatcher, MoELayer
from moesys.store import LeastRecent, PartShape, SectionCache, SectionReader, SlotPool
from moesys.units import format_bytes

RESERVE_BYTES = 192 * 2**20
"""For activations of a chunk of prompt, staging memory and what the libraries take."""

_MIN_SLOTS = 2
"""One to compute from while the next is filled."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is spent, in bytes.

    resident:   weights that every token uses, and routers.
    kv_cache:   keys and values of the sequences that are open at once.
    slot:       one expert; ``num_slots`` of ``num_experts`` fit.
    """

    budget_bytes: int
    resident_bytes: int
    kv_cache_bytes: int
    reserve_bytes: int
    slot_bytes: int
    num_slots: int
    num_experts: int

    def describe(self) -> str:
        """One line per part."""
        rows = [
            ("resident weights", self.resident_bytes),
            ("key/value cache", self.kv_cache_bytes),
            ("reserve", self.reserve_bytes),
            (f"{self.num_slots} slots", self.num_slots * self.slot_bytes),
        ]
        lines = [f"{name:<18} {format_bytes(size):>10}" for name, size in rows]
        share = self.num_slots / self.num_experts
        return "\n".join(
            [*lines, f"{self.num_slots} of {self.num_experts} experts ({share:.0%}) are kept in memory"]
        )


def plan_memory(budget_bytes: int, weights: OffloadedWeights, kv_cache_bytes: int) -> MemoryPlan:
    """Spends a budget. Raises `GenerationError` with the sum when not even two experts fit."""
    slot_bytes = sum(shape.num_bytes for shape in find_slot_shape(weights))
    fixed = weights.resident_bytes + kv_cache_bytes + RESERVE_BYTES
    num_slots = (budget_bytes - fixed) // slot_bytes
    if num_slots < _MIN_SLOTS:
        raise GenerationError(
            f"host memory {format_bytes(budget_bytes)} is less than resident weights "
            f"{format_bytes(weights.resident_bytes)} + key/value cache {format_bytes(kv_cache_bytes)} + reserve "
            f"{format_bytes(RESERVE_BYTES)} + {_MIN_SLOTS} experts {format_bytes(_MIN_SLOTS * slot_bytes)} = "
            f"{format_bytes(fixed + _MIN_SLOTS * slot_bytes)}; raise --host-memory to at least that"
        )
    num_experts = len(weights.experts.sections)
    return MemoryPlan(
        budget_bytes,
        weights.resident_bytes,
        kv_cache_bytes,
        RESERVE_BYTES,
        slot_bytes,
        min(num_slots, num_experts),
        num_experts,
    )


@dataclass(frozen=True)
class OffloadedModel:
    """A model whose experts come and go, ready for an `Engine`."""

    model: Decoder
    execution: Execution
    plan: MemoryPlan
    cache: SectionCache


@contextmanager
def load_offloaded(
    folder: Path, budget_bytes: int, *, num_positions: int, num_slots: int | None = None
) -> Iterator[OffloadedModel]:
    """Loads a model folder within a budget; its files stay open inside.

    num_positions:  tokens of the sequences that will be open at once.
    num_slots:      experts in memory; None for as many as the budget holds.

    Raises `ModelFormatError` for a folder whose experts cannot be read one by one, and `GenerationError` for a budget
    that is too small.
    """
    with open_offloaded(folder) as weights, SectionReader() as reader:
        plan = plan_memory(budget_bytes, weights, count_kv_bytes(weights.model) * num_positions)
        pool = SlotPool(plan.num_slots if num_slots is None else num_slots, find_slot_shape(weights))
        cache = SectionCache(pool, weights.experts.sections, reader, LeastRecent())
        layers = {
            layer_id: CachedLayer(cache, bank.down_EDF.shape[0], bank.form)
            for layer_id, bank in _list_banks(weights.model)
        }
        execution = Execution(LocalDispatcher(), CachedSource(layers))
        yield OffloadedModel(weights.model, execution, plan, cache)


def find_slot_shape(weights: OffloadedWeights) -> tuple[PartShape, ...]:
    """Returns the shape that every slot has; raises `GenerationError` for experts of several shapes."""
    shapes = set(weights.experts.shapes.values())
    if len(shapes) > 1:
        raise GenerationError(
            f"experts of {len(shapes)} shapes cannot share slots; this model can only be run resident, without "
            "--host-memory"
        )
    return shapes.pop()


def count_kv_bytes(model: Decoder) -> int:
    """Bytes of keys and values per token."""
    dtype: torch.dtype = model.embedding.weight.dtype
    sizes = (mixer.num_kv_heads * (mixer.key_dim + mixer.value_dim) for mixer in model.config.mixers)
    return sum(sizes) * dtype.itemsize


def _list_banks(model: Decoder) -> Iterator[tuple[int, ExpertBank]]:
    for layer_id, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if isinstance(block.feed_forward, MoELayer):
            assert isinstance(block.feed_forward.experts, ExpertBank)
            yield layer_id, block.feed_forward.experts
