"""Experts lent out of a cache: right weights for as long as a view is lent, whatever else is asked meanwhile."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_seams import make_routing
from torch import Tensor

from moesys.errors import SectionReadError, ShapeError, TrainingError
from moesys.kernels import BankView, ModuleView, fill_expert_rows, sum_rows
from moesys.moe import CachedLayer, CachedSource, Execution, LocalDispatcher, MoEConfig, MoELayer, PlainLayout
from moesys.moe.expert_key import ExpertKey
from moesys.moe.prediction_score import PredictionScore
from moesys.moe.predictors import LastIteration, Predictor
from moesys.moe.routing import Routing
from moesys.store import (
    Extent,
    LeastRecent,
    Policy,
    Section,
    SectionCache,
    SectionReader,
    SlotPool,
    StoredFile,
)
from moesys.store.open_files import ReadAt
from moesys.store.policy import PolicyName, make_policy

LAYOUT = PlainLayout(hidden_size=4, inner_size=3, dtype=torch.float32)
SHAPES = LAYOUT.part_shapes
PART_BYTES = [shape.num_bytes for shape in SHAPES]
SECTION_BYTES = sum(PART_BYTES)
OPEN = Callable[..., tuple[CachedSource, SectionCache]]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on the kernel, and the native one takes a while to build."""
    monkeypatch.setenv("MOESYS_KERNEL", "torch")


@pytest.fixture
def open_source(tmp_path: Path) -> Iterator[OPEN]:
    """Opens layers of experts, all of whose numbers are 100 * layer + expert."""
    readers: list[SectionReader] = []

    def build(
        num_layers: int,
        num_experts: int,
        num_slots: int,
        share_to_stream: float = 0.5,
        *,
        predictor: Predictor | None = None,
        policy: Policy | None = None,
        read_at: ReadAt | None = None,
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
        readers.append(SectionReader(2, read_at=read_at))
        cache = SectionCache(SlotPool(num_slots, SHAPES), sections, readers[-1], policy or LeastRecent())
        layers = dict.fromkeys(range(num_layers), CachedLayer(cache, num_experts, LAYOUT))
        return CachedSource(layers, predictor=predictor, share_to_stream=share_to_stream), cache

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

    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset >= SECTION_BYTES:
            time.sleep(0.05)
        raise OSError(5, "Input/output error")

    cache._reader._read_at = fail
    with pytest.raises(SectionReadError, match="Input/output error"):
        next(source.acquire(0, make_demand(range(4), 8)))
    assert not cache._loading
    cache._reader._read_at = os.preadv
    run(source, 0, range(8), 8)


def test_views_are_written_into_the_same_memory(open_source: OPEN, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = open_source(1, 8, num_slots=2)
    layer = MoELayer(4, MoEConfig(8, 2, 3)).eval()
    places: list[int] = []

    def fill(y_AD: Tensor, *arguments: Any) -> None:
        places.append(y_AD.data_ptr())
        fill_expert_rows(y_AD, *arguments)

    def sum_up(y_AD: Tensor, *arguments: Any) -> Tensor:
        places.append(y_AD.data_ptr())
        return sum_rows(y_AD, *arguments)

    monkeypatch.setattr("moesys.moe.layer.fill_expert_rows", fill)
    monkeypatch.setattr("moesys.moe.layer.sum_rows", sum_up)
    layer(torch.randn(20, 4), Execution(LocalDispatcher(), source))
    assert len(places) > 4
    assert len(set(places)) == 1


def pass_over_everything(source: CachedSource, num_layers: int, num_experts: int) -> None:
    for layer_id in range(num_layers):
        run(source, layer_id, range(num_experts), num_experts)


SIZES = [
    (1, 8, 3),
    (2, 64, 40),
    (2, 64, 80),
    (2, 64, 127),
    (6, 8, 1),
    (6, 8, 2),
    (6, 8, 5),
    (6, 8, 12),
    (6, 8, 33),
]


@pytest.mark.parametrize("policy", PolicyName)
@pytest.mark.parametrize(("num_layers", "num_experts", "num_slots"), SIZES)
def test_passes_read_anew_only_what_does_not_stay(
    num_layers: int, num_experts: int, num_slots: int, policy: PolicyName, open_source: OPEN
) -> None:
    source, cache = open_source(num_layers, num_experts, num_slots, policy=make_policy(policy))
    ring, _ = source._places[0]
    total, loads = num_layers * num_experts, 0
    for number in range(5):
        pass_over_everything(source, num_layers, num_experts)
        new_loads, loads = cache.stats.num_loads - loads, cache.stats.num_loads
        if number == 0:
            assert new_loads == total, "nothing of the next pass is read ahead before there was one"
        else:
            assert new_loads <= total - num_slots + 2 * ring.num_passing
    assert loads <= total + 4 * (total - num_slots + ring.num_passing) + ring.num_passing
    assert ring.num_passing <= max(4, num_experts // 3 + 1)


@pytest.mark.parametrize("num_slots", [48, 60])
def test_what_fits_is_read_once(num_slots: int, open_source: OPEN) -> None:
    source, cache = open_source(6, 8, num_slots)
    for _ in range(3):
        pass_over_everything(source, 6, 8)
    assert cache.stats.num_loads == 48


def test_what_stays_is_spread_over_the_layers(open_source: OPEN) -> None:
    source, cache = open_source(4, 16, num_slots=36)
    pass_over_everything(source, 4, 16)
    staying = [sum(cache.is_here((layer, expert)) for expert in range(16)) for layer in range(3)]
    assert staying == [8, 8, 8]


def test_a_pass_keeps_what_was_there_before_it(open_source: OPEN) -> None:
    source, cache = open_source(4, 16, num_slots=36)
    hot = [(layer, expert) for layer in range(4) for expert in range(3, 12)]
    for layer in range(4):
        run(source, layer, range(3, 9), 16)
        run(source, layer, range(9, 12), 16)
    assert cache.stats.num_loads == 36
    pass_over_everything(source, 4, 16)
    assert cache.stats.num_loads <= 36 + 64 - 36 + source._places[0][0].num_passing
    assert sum(cache.is_here(key) for key in hot) >= 32 - 4


def test_layers_are_read_ahead_as_slots_last(open_source: OPEN) -> None:
    source, cache = open_source(4, 4, num_slots=10)
    views = source.acquire(0, make_demand(range(4), 4))
    view = next(views)
    assert all(cache.is_here((layer, expert)) for layer in (0, 1) for expert in range(4))
    assert sum(cache.is_here((2, expert)) for expert in range(4)) == 2
    source.release(0, view)
    for rest in views:
        source.release(0, rest)
    for layer in (1, 2, 3):
        run(source, layer, range(4), 4)
    assert cache.stats.num_loads == 16


def test_the_first_layer_is_read_ahead_where_another_pass_may_follow(open_source: OPEN) -> None:
    source, cache = open_source(4, 8, num_slots=12)
    pass_over_everything(source, 4, 8)
    before = sum(cache.is_here((0, expert)) for expert in range(8))
    pass_over_everything(source, 4, 8)
    assert sum(cache.is_here((0, expert)) for expert in range(8)) > before


def test_the_last_layer_of_a_pass_leaves_nothing_pinned(open_source: OPEN) -> None:
    source, cache = open_source(3, 8, num_slots=7)
    pass_over_everything(source, 3, 8)
    assert not any(entry.num_pins for entry in cache._entries.values())
    run(source, 0, range(8), 8)
    assert any(entry.num_pins for entry in cache._entries.values())
    run(source, 1, [2], 8)
    assert not any(entry.num_pins for entry in cache._entries.values())


def test_a_pass_that_does_not_need_everything_goes_on(open_source: OPEN) -> None:
    source, _ = open_source(4, 8, num_slots=9)
    for number in range(12):
        for layer in range(4):
            run(source, layer, [e for e in range(8) if (e + number + layer) % 3], 8)


def test_what_was_read_ahead_for_nobody_makes_room(open_source: OPEN) -> None:
    source, cache = open_source(4, 8, num_slots=12)
    ring, _ = source._places[0]
    run(source, 0, range(8), 8)
    assert all(cache.is_here((1, expert)) for expert in range(8)), (
        "what layer 0 leaves makes room for layer 1"
    )
    run(source, 1, range(4), 8)
    held = [key for key in ring._pinned if key[0] == 1]
    assert all(ring.stays(key) for key in held)


def test_a_pass_goes_on_where_others_hold_the_slots(open_source: OPEN) -> None:
    source, cache = open_source(3, 8, num_slots=9)
    pass_over_everything(source, 3, 8)
    residents = [(0, 1), (1, 1), (2, 1), (2, 2), (2, 3), (1, 2), (1, 3), (0, 2)]
    cache.pin_resident(residents)
    for _ in range(3):
        pass_over_everything(source, 3, 8)
    assert all(cache.is_ready(key) for key in residents)


def test_in_a_pass_what_makes_room_is_computed_before_what_stays(open_source: OPEN) -> None:
    source, cache = open_source(2, 16, num_slots=20)
    for _ in range(2):
        pass_over_everything(source, 2, 16)
    ring, _ = source._places[0]
    cache.settle(list(cache._loading))
    views = []
    for view in source.acquire(0, make_demand(range(16), 16)):
        views.append([ring.stays((0, expert)) for expert in list_right(view, 0)])
        source.release(0, view)
    assert views[0] == [False] * ring.num_passing
    assert sum(map(len, views)) == 16
    assert sum(map(sum, views)) == 8, "half of the layer stays"


def test_reading_and_computing_overlap_in_a_pass(open_source: OPEN) -> None:
    read_s, compute_s = 0.01, 0.01

    def read_slowly(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(read_s / 2)
        return os.preadv(descriptor, buffers, offset)

    source, cache = open_source(4, 8, num_slots=16, read_at=read_slowly)
    for _ in range(2):
        begin, loads, computed_s = time.perf_counter(), cache.stats.num_loads, 0.0
        for layer_id in range(4):
            for view in source.acquire(layer_id, make_demand(range(8), 8)):
                start = time.perf_counter()
                time.sleep(compute_s * len(list_right(view, layer_id)))
                computed_s += time.perf_counter() - start
                source.release(layer_id, view)
        taken, num_loads = time.perf_counter() - begin, cache.stats.num_loads - loads
    alone = num_loads * read_s / 2
    assert taken - computed_s < 0.5 * alone, "most of the reads, two at a time, hide behind the compute"


def test_the_uses_are_counted(open_source: OPEN) -> None:
    source, _ = open_source(2, 8, num_slots=4)
    for experts in ([1, 2], [2], [2, 5]):
        run(source, 1, experts, 8)
    assert source.uses == {(1, 1): 1, (1, 2): 3, (1, 5): 1}


def test_a_few_experts_of_a_layer_do_not_start_a_pass_over_everything(open_source: OPEN) -> None:
    source, cache = open_source(2, 8, num_slots=16)
    run(source, 0, [0, 1, 2], 8)
    assert cache.stats.num_loads == 3


class Told:
    """A predictor whose guesses are given."""

    def __init__(self, guesses: dict[int, list[ExpertKey]]) -> None:
        self.guesses = guesses
        self.observed: list[int] = []

    def observe(self, layer_id: int, routing: Routing, x_TD: Tensor | None) -> None:
        self.observed.append(layer_id)

    def guess(self, layer_id: int) -> list[ExpertKey]:
        return self.guesses.get(layer_id, [])


def test_guesses_are_read_when_all_that_is_demanded_has_arrived(open_source: OPEN) -> None:
    told = Told({0: [(1, 5), (1, 6)]})
    source, cache = open_source(2, 8, num_slots=6, predictor=told)
    views = source.acquire(0, make_demand([0, 1, 2], 8))
    seen = 0
    for view in views:
        seen += len(list_right(view, 0))
        assert cache.is_here((1, 5)) == cache.is_here((1, 6)) == (seen == 3)
        source.release(0, view)
    run(source, 1, [5, 7], 8)
    assert (cache.stats.prefetch_issued, cache.stats.prefetch_used) == (2, 1)


def test_a_guess_evicts_neither_what_was_used_lately_nor_what_is_guessed_too(open_source: OPEN) -> None:
    told = Told({1: [(0, 0), (0, 6), (0, 7)]})
    source, cache = open_source(2, 8, num_slots=5, predictor=told)
    run(source, 0, [0, 1], 8)
    run(source, 0, [2, 3], 8)
    run(source, 1, [4], 8)
    lately = [(0, 2), (0, 3), (1, 4)]
    assert all(cache.is_here(key) for key in [*lately, (0, 0), (0, 6)])
    assert not cache.is_here((0, 1)), "it was used before the last turn and nobody guessed it"
    assert not cache.is_here((0, 7)), "what is left was used lately, is guessed or waits for its first use"


def test_the_score_is_of_what_was_read_on_a_guess(open_source: OPEN) -> None:
    told = Told({0: [(1, 0), (1, 1), (1, 2), (1, 3)]})
    source, cache = open_source(2, 8, num_slots=5, predictor=told)
    run(source, 0, [0, 1, 2], 8)
    assert PredictionScore.of_reads(cache.stats) == PredictionScore(2, 0, 3), (
        "there are slots for two guesses"
    )
    run(source, 1, [0, 3], 8)
    assert PredictionScore.of_reads(cache.stats) == PredictionScore(2, 1, 3 + 2)
    pass_over_everything(source, 2, 8)
    assert PredictionScore.of_reads(cache.stats).num_guessed == 2, "what a pass reads ahead is no guess"


def test_an_interrupted_guess_leaves_nothing_pinned(open_source: OPEN) -> None:
    class Interrupted(Told):
        def guess(self, layer_id: int) -> list[ExpertKey]:
            raise KeyboardInterrupt

    source, cache = open_source(2, 8, num_slots=6, predictor=Interrupted({}))
    with pytest.raises(KeyboardInterrupt):
        run(source, 0, [0, 1, 2], 8)
    assert not any(entry.num_pins for entry in cache._entries.values())
    assert not source._loans


class Keeping:
    """A source whose generators somebody else holds too, so that none ends by being forgotten."""

    def __init__(self, source: CachedSource) -> None:
        self._source = source
        self.kept: list[Generator[BankView | ModuleView, None, None]] = []

    def hint(self, layer_id: int, routing: Routing) -> None:
        self._source.hint(layer_id, routing)

    def acquire(self, layer_id: int, demand: Tensor) -> Generator[BankView | ModuleView, None, None]:
        self.kept.append(self._source.acquire(layer_id, demand))
        return self.kept[-1]

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        self._source.release(layer_id, view)


def test_an_error_while_a_view_is_computed_leaves_nothing_pinned(
    open_source: OPEN, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = open_source(1, 8, num_slots=4)

    def fail(*arguments: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("moesys.moe.layer.fill_expert_rows", fail)
    layer, keeping = MoELayer(4, MoEConfig(8, 2, 3)).eval(), Keeping(source)
    with pytest.raises(RuntimeError, match="no memory"):
        layer(torch.randn(20, 4), Execution(LocalDispatcher(), keeping))
    assert len(keeping.kept) == 1
    assert not any(entry.num_pins for entry in cache._entries.values())


def test_views_given_up_late_do_not_end_the_layer_that_follows(open_source: OPEN) -> None:
    source, _ = open_source(2, 8, num_slots=8)
    ring, _ = source._places[0]
    first = source.acquire(0, make_demand(range(8), 8))
    source.release(0, next(first))
    second = source.acquire(1, make_demand(range(8), 8))
    source.release(1, next(second))
    first.close()
    assert ring._group == 1
    for view in second:
        source.release(1, view)
    assert ring._group is None


def test_a_prompt_and_the_tokens_after_it_read_no_more_than_they_need(open_source: OPEN) -> None:
    source, cache = open_source(3, 8, num_slots=12)
    ring, _ = source._places[0]
    pass_over_everything(source, 3, 8)
    assert (cache.stats.num_loads, cache.stats.prefetch_issued) == (24, 0)
    assert cache.stats.ahead_issued > 8
    pass_over_everything(source, 3, 8)
    loads = cache.stats.num_loads
    assert loads <= 24 + 24 - 12 + 2 * ring.num_passing
    for layer in range(3):
        run(source, layer, [next(e for e in range(8) if cache.is_here((layer, e)))], 8)
    assert cache.stats.num_loads == loads, "tokens that need what is there read nothing"
    assert cache.stats.num_wasted <= ring.num_passing


def test_a_wrong_guess_changes_no_result(open_source: OPEN) -> None:
    told = Told({0: [(1, 6), (1, 7)], 1: [(0, 6)]})
    source, cache = open_source(2, 8, num_slots=6, predictor=told)
    for number in range(20):
        for layer in range(2):
            run(source, layer, [number % 6, (number + layer + 3) % 6], 8)
    assert cache.stats.num_wasted > 0


def test_the_predictor_is_told_the_routing(open_source: OPEN) -> None:
    told = Told({})
    source, _ = open_source(1, 8, num_slots=4, predictor=told)
    layer = MoELayer(4, MoEConfig(8, 2, 3)).eval()
    layer(torch.randn(3, 4), Execution(LocalDispatcher(), source))
    assert told.observed == [0]


def test_a_failed_guess_is_read_anew_by_a_demand(open_source: OPEN) -> None:
    source, cache = open_source(2, 8, num_slots=6, predictor=Told({0: [(1, 5)]}))

    def fail(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset >= 13 * SECTION_BYTES:
            raise OSError(5, "Input/output error")
        return os.preadv(descriptor, buffers, offset)

    cache._reader._read_at = fail
    run(source, 0, [0], 8)
    cache.settle([(1, 5)])
    cache._reader._read_at = os.preadv
    run(source, 1, [5], 8)


def repeat_passes(source: CachedSource, count: int) -> None:
    for _ in range(count):
        pass_over_everything(source, 3, 8)


def test_an_error_in_a_pass_leaves_nothing_pinned_and_the_next_one_is_right(open_source: OPEN) -> None:
    source, cache = open_source(3, 8, num_slots=10)
    for bad in (3, 12, 20):

        def fail(descriptor: int, buffers: Sequence[memoryview], offset: int, bad: int = bad) -> int:
            if bad * SECTION_BYTES <= offset < (bad + 1) * SECTION_BYTES:
                raise OSError(5, "Input/output error")
            return os.preadv(descriptor, buffers, offset)

        cache._reader._read_at = fail
        with pytest.raises(SectionReadError, match="Input/output error"):
            repeat_passes(source, 3)
        cache._reader._read_at = os.preadv
        assert not any(entry.num_pins for entry in cache._entries.values())
        pass_over_everything(source, 3, 8)


def test_the_last_iteration_is_read_ahead_of_its_layer(open_source: OPEN) -> None:
    source, cache = open_source(2, 8, num_slots=5, predictor=LastIteration([0, 1]))
    layers = [MoELayer(4, MoEConfig(8, 2, 3), layer_id=i).eval() for i in range(2)]
    x, execution = torch.randn(1, 4), Execution(LocalDispatcher(), source)
    for layer in layers:
        layer(x, execution)
    needed = [key for key in source.uses if key[0] == 1]
    for expert in set(range(8)) - {expert for _, expert in needed}:
        run(source, 1, [expert], 8)
    assert not any(cache.is_here(key) for key in needed)
    layers[0](x, execution)
    assert all(cache.is_here(key) for key in needed)


def test_where_everything_fits_nobody_is_asked_for_guesses(open_source: OPEN) -> None:
    source, cache = open_source(2, 8, num_slots=16, predictor=Told({0: [(1, 5)]}))
    run(source, 0, [0], 8)
    assert not cache.is_here((1, 5))


@pytest.mark.parametrize("policy", PolicyName)
def test_any_mixture_of_demands_is_served_right_with_any_number_of_slots(
    policy: PolicyName, open_source: OPEN
) -> None:
    draw = random.Random(0)
    for num_slots in (1, 2, 3, 7, 12, 23, 24):
        source, cache = open_source(
            3, 8, num_slots, policy=make_policy(policy), predictor=LastIteration(range(3))
        )
        for _ in range(60):
            count = draw.choice([1, 2, 8, 8, 7])
            for layer in range(draw.choice([3, 3, 3, 1, 2])):
                source.hint(layer, make_routing([draw.sample(range(8), 2)], 8, fixed_k=2))
                run(source, layer, draw.sample(range(8), count), 8)
        run(source, 0, [0], 8)
        assert not any(entry.num_pins for entry in cache._entries.values())
        memory = cache.describe()
        cache.settle(list(cache._loading))
        assert memory.num_free + len(cache._entries) == num_slots
        assert cache.stats.num_wasted <= cache.stats.prefetch_issued + cache.stats.num_loads // 2
