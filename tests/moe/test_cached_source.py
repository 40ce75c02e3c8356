"""Experts lent out of a cache: right weights for as long as a view is lent, whatever else is asked meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesys.errors import SectionReadError, ShapeError, TrainingError
from moesys.kernels import BankView, ModuleView, compute_experts, sum_rows
from moesys.moe import CachedLayer, CachedSource, Execution, LocalDispatcher, MoEConfig, MoELayer, PlainLayout
from moesys.moe.cached_source import ExpertKey
from moesys.store import (
    Extent,
    LeastRecent,
    Section,
    SectionCache,
    SectionReader,
    SlotPool,
    StoredFile,
)

LAYOUT = PlainLayout(hidden_size=4, inner_size=3, dtype=torch.float32)
SHAPES = LAYOUT.part_shapes
PART_BYTES = [shape.num_bytes for shape in SHAPES]
SECTION_BYTES = sum(PART_BYTES)
OPEN = Callable[..., tuple[CachedSource, SectionCache]]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def open_source(tmp_path: Path) -> Iterator[OPEN]:
    """Opens layers of experts, all of whose numbers are 100 * layer + expert."""
    readers: list[SectionReader] = []

    def build(
        num_layers: int, num_experts: int, num_slots: int, share_to_stream: float = 0.5
    ) -> tuple[CachedSource, SectionCache]:
        path = tmp_path / "experts.bin"
        keys = [(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
        numbers = torch.tensor([100.0 * layer + expert for layer, expert in keys])
        path.write_bytes(numbers.repeat_interleave(SECTION_BYTES // 4).numpy().tobytes())
        descriptor = os.open(path, os.O_RDONLY)
        file = StoredFile.identify(path, descriptor)
        os.close(descriptor)
        sections = {
            key: Section(
                str(key),
                (
                    Extent(file, i * SECTION_BYTES, PART_BYTES[0], 0),
                    Extent(file, i * SECTION_BYTES + PART_BYTES[0], PART_BYTES[1], 1),
                ),
            )
            for i, key in enumerate(keys)
        }
        readers.append(SectionReader(2))
        cache = SectionCache(SlotPool(num_slots, SHAPES), sections, readers[-1], LeastRecent())
        layer = CachedLayer(cache, num_experts, LAYOUT)
        source = CachedSource(dict.fromkeys(range(num_layers), layer), share_to_stream=share_to_stream)
        return source, cache

    yield build
    for reader in readers:
        reader.close()


def make_demand(experts: Sequence[int], num_experts: int) -> Tensor:
    counts = torch.zeros(num_experts, dtype=torch.int64)
    counts[list(experts)] = 1
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def list_right(view: object, layer_id: int) -> list[int]:
    """The experts of a view, each with its own numbers."""
    assert isinstance(view, BankView)
    assert isinstance(view.gate_up_SFD, Tensor)
    assert isinstance(view.down_SDF, Tensor)
    experts = []
    for expert, slot in enumerate(view.compute_slots()):
        if slot >= 0:
            assert view.gate_up_SFD[slot].eq(100 * layer_id + expert).all()
            assert view.down_SDF[slot].eq(100 * layer_id + expert).all()
            experts.append(expert)
    return experts


def run(source: CachedSource, layer_id: int, experts: Sequence[int], num_experts: int) -> None:
    """Acquires as the layer does."""
    served: list[int] = []
    for view in source.acquire(layer_id, make_demand(experts, num_experts)):
        served += list_right(view, layer_id)
        source.release(layer_id, view)
    assert sorted(served) == sorted(experts)


def test_views_keep_their_weights_until_they_are_released(open_source: OPEN) -> None:
    source, _ = open_source(2, 8, num_slots=8)
    views = list(source.acquire(0, make_demand(range(4), 8)))
    others = list(source.acquire(1, make_demand(range(4), 8)))
    assert sorted(e for view in views for e in list_right(view, 0)) == [0, 1, 2, 3]
    assert sorted(e for view in others for e in list_right(view, 1)) == [0, 1, 2, 3]
    for view in views:
        source.release(0, view)
    run(source, 0, [4, 5, 6, 7], 8)
    assert sorted(e for view in others for e in list_right(view, 1)) == [0, 1, 2, 3]


def test_views_that_hold_every_slot_are_an_error_and_no_wrong_weights(open_source: OPEN) -> None:
    source, cache = open_source(1, 8, num_slots=2)
    views: list[BankView | ModuleView] = []
    with pytest.raises(ShapeError, match=r"all 2 slots are held by [12] views that were not released"):
        views.extend(source.acquire(0, make_demand(range(8), 8)))
    assert sorted(e for view in views for e in list_right(view, 0)) == [0, 1]
    with pytest.raises(ShapeError, match="not released"):
        next(source.acquire(0, make_demand([5], 8)))
    for view in views:
        source.release(0, view)
    run(source, 0, range(8), 8)
    assert cache.start((0, 0)), "nothing is pinned any more"


def test_a_view_is_released_once(open_source: OPEN) -> None:
    source, _ = open_source(1, 4, num_slots=4)
    view = next(source.acquire(0, make_demand([1], 4)))
    source.release(0, view)
    with pytest.raises(ShapeError, match="this view is not lent"):
        source.release(0, view)


def test_whoever_stops_early_leaves_nothing_pinned(open_source: OPEN) -> None:
    source, cache = open_source(1, 8, num_slots=2)
    views = source.acquire(0, make_demand(range(8), 8))
    view = next(views)
    source.release(0, view)
    assert isinstance(views, Iterator)
    views.close()  # type: ignore[attr-defined]
    run(source, 0, [6, 7], 8)
    assert all(not entry.num_pins for entry in cache._entries.values())


def test_a_training_pass_is_refused(open_source: OPEN) -> None:
    source, _ = open_source(1, 4, num_slots=4)
    with torch.enable_grad(), pytest.raises(TrainingError, match=r"layer 0: .* under torch\.no_grad\(\)"):
        next(source.acquire(0, make_demand([0], 4)))
    with torch.inference_mode():
        run(source, 0, [0], 4)


def test_a_layer_that_is_not_there_is_named(open_source: OPEN) -> None:
    source, _ = open_source(2, 4, num_slots=4)
    with pytest.raises(ShapeError, match=r"layer 7 has no experts in this source; it holds layers \[0, 1\]"):
        next(source.acquire(7, make_demand([0], 4)))


def test_closed_files_are_an_error_even_where_every_expert_is_there(open_source: OPEN) -> None:
    source, cache = open_source(1, 4, num_slots=4)
    run(source, 0, range(4), 4)
    cache._reader.close()
    with pytest.raises(SectionReadError, match="the files of this model were closed"):
        next(source.acquire(0, make_demand([0], 4)))


def test_after_an_error_nothing_is_on_its_way(open_source: OPEN) -> None:
    source, cache = open_source(1, 8, num_slots=4)

    def fail(descriptor: int, buffer: memoryview, offset: int) -> int:
        if offset >= SECTION_BYTES:
            time.sleep(0.05)
        raise OSError(5, "Input/output error")

    cache._reader._read_at = fail
    with pytest.raises(SectionReadError, match="Input/output error"):
        next(source.acquire(0, make_demand(range(4), 8)))
    assert not cache._loading
    cache._reader._read_at = lambda descriptor, buffer, offset: os.preadv(descriptor, [buffer], offset)
    run(source, 0, range(8), 8)


def test_views_add_up_in_the_memory_of_the_first(open_source: OPEN, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = open_source(1, 8, num_slots=2)
    layer = MoELayer(4, MoEConfig(8, 2, 3)).eval()
    parts: list[Tensor] = []
    totals: list[Tensor] = []

    def compute(*arguments: Any, **options: Any) -> Tensor:
        parts.append(compute_experts(*arguments, **options))
        return parts[-1]

    def sum_up(y_AD: Tensor, *arguments: Any) -> Tensor:
        totals.append(y_AD)
        return sum_rows(y_AD, *arguments)

    monkeypatch.setattr("moesys.moe.layer.compute_experts", compute)
    monkeypatch.setattr("moesys.moe.layer.sum_rows", sum_up)
    layer(torch.randn(20, 4), Execution(LocalDispatcher(), source))
    assert len(parts) > 3
    assert totals[0].data_ptr() == parts[0].data_ptr()


def count_loads(
    open_source: OPEN, num_layers: int, num_experts: int, num_slots: int, *, reads_ahead: bool
) -> int:
    source, cache = open_source(num_layers, num_experts, num_slots, 0.5 if reads_ahead else 2.0)
    for _ in range(3):
        for layer_id in range(num_layers):
            run(source, layer_id, range(num_experts), num_experts)
    return cache.stats.num_loads


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "num_slots"),
    [(2, 64, 40), (2, 64, 80), (2, 64, 100), (6, 8, 5), (6, 8, 12), (6, 8, 20), (6, 8, 33), (6, 8, 47)],
)
def test_reading_ahead_loads_no_more_than_not_doing_so(
    num_layers: int, num_experts: int, num_slots: int, open_source: OPEN
) -> None:
    ahead, plain = (
        count_loads(open_source, num_layers, num_experts, num_slots, reads_ahead=reads_ahead)
        for reads_ahead in (True, False)
    )
    assert ahead <= plain


def test_the_next_layer_is_read_while_this_one_computes(open_source: OPEN) -> None:
    source, cache = open_source(3, 4, num_slots=12)
    views = source.acquire(0, make_demand(range(4), 4))
    view = next(views)
    source.release(0, view)
    assert all(cache.is_here((1, expert)) for expert in range(4))
    assert not any(cache.is_here((2, expert)) for expert in range(4))
    for rest in views:
        source.release(0, rest)
    run(source, 1, range(4), 4)
    run(source, 2, range(4), 4)
    assert cache.stats.num_loads == 12, "after the last layer nothing is read ahead"
    keys: list[ExpertKey] = [(layer, expert) for layer in range(3) for expert in range(4)]
    assert all(cache.is_here(key) for key in keys)


def test_a_few_experts_of_a_layer_do_not_start_a_pass_over_everything(open_source: OPEN) -> None:
    source, cache = open_source(2, 8, num_slots=16)
    run(source, 0, [0, 1, 2], 8)
    assert cache.stats.num_loads == 3
