"""Law 2 where experts come in every way at once: in order over several passes, by demand, on a guess, rounded, and in
slots of several shapes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesys.checkpoint import PackedForm, list_banks, load_model, pack_model, save_model
from moesys.checkpoint.expert_sections import make_plain_layout
from moesys.errors import GenerationError
from moesys.inference import Engine, SequenceStep
from moesys.inference.offload import load_offloaded
from moesys.inference.offload_plan import OffloadPlan, OffloadRequest, divide_slots
from moesys.inference.offload_plan import _limit_slots as limit_slots
from moesys.models import AttentionConfig, Decoder, DecoderConfig, QKNorm, RopeConfig, initialize_weights
from moesys.moe import (
    CachedLayer,
    CachedSource,
    EarlyRouter,
    Execution,
    ExpertKey,
    LocalDispatcher,
    MoEConfig,
    PlainLayout,
    SlotLayout,
    find_layers,
)
from moesys.planning import Budget, Footprint, TierPlacement
from moesys.store import (
    CacheStats,
    Extent,
    LeastRecent,
    ReadMode,
    Section,
    SectionCache,
    SectionReader,
    SlotPool,
    StoredFile,
)

NUM_POSITIONS, PASS_TOKENS, NUM_PASSES = 72, 20, 3
MIXER = AttentionConfig(4, 2, 8, RopeConfig(8), qk_norm=QKNorm.PER_HEAD)


def make_model(*layers: MoEConfig) -> Decoder:
    config = DecoderConfig(
        61, 32, (MIXER,) * len(layers), layers, tie_embeddings=False, max_positions=NUM_POSITIONS
    )
    model = Decoder(config)
    initialize_weights(model, seed=1, std=0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modes")
    save_model(make_model(*(MoEConfig(8, 2, 24),) * 3), path, torch.float32, {})
    return path


def compute_logits(model: Decoder, execution: Execution | None = None) -> Tensor:
    """A prompt in several passes, then token by token."""
    engine, draw = Engine(model, execution), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (NUM_POSITIONS,), generator=draw).tolist()
    sequence = engine.open_sequence(NUM_POSITIONS)
    ends = [
        *range(0, NUM_PASSES * PASS_TOKENS, PASS_TOKENS),
        *range(NUM_PASSES * PASS_TOKENS, NUM_POSITIONS + 1),
    ]
    logits: list[Tensor] = []
    for start, end in pairwise(ends):
        logits += engine.step([SequenceStep(sequence, start, ids[start:end])])
    return torch.cat(logits)


@pytest.mark.parametrize("form", [None, PackedForm.FLOAT, PackedForm.INT8], ids=["folder", "packed", "int8"])
def test_passes_tokens_and_guesses_give_the_bits_of_the_resident_model(
    form: PackedForm | None, folder: Path, tmp_path: Path
) -> None:
    path = folder
    if form is not None:
        path = tmp_path / "packed"
        pack_model(folder, path, form=form)
    resident = compute_logits(load_model(path))
    for num_slots in (1, 2, 5, 12, 23):
        for predicts in (False, True):
            request = OffloadRequest("1GiB", NUM_POSITIONS, num_slots=num_slots, predicts=predicts)
            with load_offloaded(path, request) as offloaded:
                found = compute_logits(offloaded.model, offloaded.execution)
                stats = offloaded.stats
            assert torch.equal(found, resident), (num_slots, predicts)
            assert (stats.prefetch_issued > 0) == (predicts and num_slots > 2), (
                "two slots leave none for a guess"
            )
            assert num_slots == 1 or stats.ahead_issued > 10, "the passes of the prompt are read ahead"


PYRAMID = (MoEConfig(4, 2, 16), MoEConfig(8, 2, 16), MoEConfig(8, 2, 24), MoEConfig(12, 2, 24))


@contextmanager
def offload(
    model: Decoder, path: Path, slots: Mapping[SlotLayout, int], *, predicts: bool
) -> Iterator[tuple[Execution, list[CacheStats]]]:
    """Puts a model's experts into a file, and a cache for each of their shapes before it."""
    layouts: dict[int, PlainLayout] = {}
    sections: dict[PlainLayout, dict[ExpertKey, Section]] = {}
    parts = [
        (
            layer_id,
            expert,
            bank.gate_up_EFD[expert],
            bank.down_EDF[expert],
            make_plain_layout(bank, torch.float32),
        )
        for layer_id, bank in list_banks(model)
        for expert in range(bank.down_EDF.shape[0])
    ]
    path.write_bytes(b"".join(part.numpy().tobytes() for _, _, *both, _ in parts for part in both))
    descriptor = os.open(path, os.O_RDONLY)
    file = StoredFile.identify(path, descriptor)
    os.close(descriptor)
    offset = 0
    for layer_id, expert, gate_up, down, layout in parts:
        sizes = [part.numel() * 4 for part in (gate_up, down)]
        extents = (Extent(file, offset, sizes[0], 0), Extent(file, offset + sizes[0], sizes[1], 1))
        sections.setdefault(layout, {})[layer_id, expert] = Section(f"{layer_id}, {expert}", extents)
        layouts[layer_id] = layout
        offset += sum(sizes)
    routers = {layer_id: layer.router for layer_id, layer in find_layers(model).items()}
    with SectionReader(2) as reader, EarlyRouter(routers) as early:
        caches = {
            layout: SectionCache(SlotPool(slots[layout], layout.part_shapes), own, reader, LeastRecent())
            for layout, own in sections.items()
        }
        layers = {
            layer_id: CachedLayer(caches[layouts[layer_id]], bank.down_EDF.shape[0], layouts[layer_id])
            for layer_id, bank in list_banks(model)
        }
        source = CachedSource(layers, predictor=early if predicts else None)
        yield Execution(LocalDispatcher(), source), [cache.stats for cache in caches.values()]
        pins = [entry.num_pins for cache in caches.values() for entry in cache._entries.values()]
        assert not any(pins)


def make_plan(sizes: Mapping[SlotLayout, list[int]], num_slots: int, *, asked: bool) -> OffloadPlan:
    footprint = Footprint(1000, tuple(size for of_layout in sizes.values() for size in of_layout), 0)
    budget = Budget("RAM", 10**6)
    tier = TierPlacement(budget, 1000, num_slots, num_slots * footprint.slot_bytes, 0, 0, 0)
    request = OffloadRequest("1GiB", num_slots=num_slots if asked else None)
    return OffloadPlan(request, footprint, tier, 10, 1, 10, ReadMode.BUFFERED, 1, None)


@pytest.mark.parametrize("predicts", [False, True])
@pytest.mark.parametrize("num_slots", [2, 3, 9, 31, 32])
def test_experts_of_two_shapes_have_slots_of_their_own(
    num_slots: int, predicts: bool, tmp_path: Path
) -> None:
    model = make_model(*PYRAMID)
    resident = compute_logits(model)
    sizes: dict[SlotLayout, list[int]] = {}
    for _, bank in list_banks(model):
        layout = make_plain_layout(bank, torch.float32)
        num_bytes = sum(shape.num_bytes for shape in layout.part_shapes)
        sizes.setdefault(layout, []).extend([num_bytes] * bank.down_EDF.shape[0])
    slots = divide_slots(make_plan(sizes, num_slots, asked=True), sizes)
    assert min(slots.values()) >= 1
    assert num_slots - len(sizes) < sum(slots.values()) <= num_slots
    with offload(model, tmp_path / "experts", slots, predicts=predicts) as (execution, stats):
        found = compute_logits(model, execution)
    assert torch.equal(found, resident)
    assert all(of_shape.num_loads > 0 for of_shape in stats)


SMALL, LARGE = PlainLayout(32, 16, torch.float32), PlainLayout(32, 24, torch.float32)


def test_a_budget_is_divided_by_bytes_and_every_shape_gets_a_slot() -> None:
    sizes: dict[SlotLayout, list[int]] = {SMALL: [10] * 100, LARGE: [100] * 3}
    assert divide_slots(make_plan(sizes, 2, asked=True), sizes) == {SMALL: 1, LARGE: 1}
    assert divide_slots(make_plan(sizes, 2, asked=False), sizes) == {SMALL: 1 + 7, LARGE: 1}
    for num_slots in range(2, 14):
        slots = divide_slots(make_plan(sizes, num_slots, asked=False), sizes)
        assert 10 * slots[SMALL] + 100 * slots[LARGE] <= 100 * num_slots
    assert divide_slots(make_plan(sizes, 13, asked=False), sizes) == {SMALL: 100, LARGE: 3}
    with pytest.raises(GenerationError, match="one of each takes 110; raise --host-memory"):
        divide_slots(make_plan(sizes, 1, asked=False), sizes)


def test_fewer_slots_than_shapes_are_refused() -> None:
    sizes: dict[SlotLayout, list[int]] = {SMALL: [10] * 100, LARGE: [100] * 3}
    plan = make_plan(sizes, 5, asked=False)
    with pytest.raises(GenerationError, match=r"num_slots \(1\) must be 2 to 5, from one for each shape"):
        limit_slots(plan, 1)
    assert limit_slots(plan, 2).tier.expert_bytes == 200
