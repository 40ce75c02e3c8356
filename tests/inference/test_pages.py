"""Pages: each has one owner at a time, a sequence's lie side by side, and growth keeps what is cached."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moesys.errors import GenerationError
from moesys.inference.kv_cache import SequenceCache
from moesys.inference.page_allocator import PageAllocator
from moesys.inference.pages import PagePool
from moesys.models import AttentionConfig, RopeConfig

MIXERS = (AttentionConfig(4, 2, 6, RopeConfig(6)), AttentionConfig(4, 1, 8, RopeConfig(8)))


def make_pool(num_pages: int, page_tokens: int = 4) -> PagePool:
    return PagePool(MIXERS, num_pages, page_tokens, dtype=torch.float32, device=torch.device("cpu"))


def test_a_pool_holds_what_the_mixers_cache() -> None:
    pool = make_pool(5)
    shapes = [[tuple(tensor.shape) for tensor in layer] for layer in pool.layers]
    assert shapes == [[(20, 2, 6), (20, 2, 6)], [(20, 1, 8), (20, 1, 8)]]
    assert pool.num_bytes == 20 * (24 + 16) * 4
    assert pool.widths == [12, 12, 8, 8]
    assert [pool.count_pages(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(("num_pages", "page_tokens"), [(-1, 4), (3, 0)])
def test_a_pool_of_no_size_is_refused(num_pages: int, page_tokens: int) -> None:
    with pytest.raises(
        GenerationError, match=rf"num_pages \({num_pages}\) of 0 or more and page_tokens \({page_tokens}\)"
    ):
        make_pool(num_pages, page_tokens)


def test_sequences_that_grow_in_turns_lie_in_one_piece_each() -> None:
    pool = make_pool(12)
    caches = [SequenceCache(pool, 16) for _ in range(3)]
    for length in range(1, 17):
        for cache in caches:
            cache.resize(length)
    assert [len(cache.find_runs(0, 16)) for cache in caches] == [1, 1, 1]
    assert pool.allocator.num_free == 0


def test_a_new_sequence_takes_the_place_of_one_that_ended() -> None:
    pool = make_pool(12)
    caches = [SequenceCache(pool, 16) for _ in range(3)]
    for cache in caches:
        cache.resize(16)
    caches[1].close()
    new = SequenceCache(pool, 15)
    new.resize(15)
    assert sorted(new.pages) == sorted(range(4, 8))
    assert len(new.find_runs(0, 15)) == 1


def test_the_smallest_gap_that_is_wide_enough_is_a_home() -> None:
    allocator = PageAllocator(10)
    homes = [allocator.reserve(n) for n in (4, 1, 2, 1)]
    for home, count in zip(homes, (4, 1, 2, 1), strict=True):
        for _ in range(count):
            allocator.take(home)
    allocator.give_back([0, 1, 2, 3])
    allocator.dissolve(homes[0])
    allocator.give_back([5, 6])
    allocator.dissolve(homes[2])
    assert allocator.take(allocator.reserve(2)) == 5
    assert allocator.take(allocator.reserve(3)) == 0


def test_pages_that_others_reserved_are_taken_last_and_from_their_end() -> None:
    pool = make_pool(6)
    first, second = SequenceCache(pool, 16), SequenceCache(pool, 24)
    first.resize(4)
    second.resize(5 * 4)
    assert first.pages == [0]
    assert second.pages == [4, 5, 3, 2, 1]
    assert pool.allocator.num_free == 0
    second.resize(12)
    first.resize(12)
    assert second.pages == [4, 5, 3]
    assert first.pages == [0, 1, 2]


def test_runs_and_pieces_are_the_rows_of_the_tokens() -> None:
    cache = SequenceCache(make_pool(8), 32)
    cache.pages = [2, 3, 7, 0, 1, 5]
    for start in range(24):
        for stop in range(start + 1, 25):
            runs = cache.find_runs(start, stop)
            rows = [row for run in runs for row in range(run.start, run.stop)]
            assert rows == [cache.pages[t // 4] * 4 + t % 4 for t in range(start, stop)]
            assert all(before.stop != after.start for before, after in pairwise(runs))
            (piece,) = cache.find_pieces(start, stop)
            seen = [row for run in piece.runs for row in range(run.start, run.stop)][piece.num_skipped :]
            assert seen == rows
            assert (piece.num_skipped, piece.num_visible) == (start % 4, stop - start)
    assert cache.find_runs(0, 24) == [slice(8, 16), slice(28, 32), slice(0, 8), slice(20, 24)]


def test_growth_keeps_what_is_cached() -> None:
    pool = make_pool(2)
    cache = SequenceCache(pool, 8)
    cache.resize(8)
    for layer in pool.layers:
        for number, tensor in enumerate(layer):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + number)
    before = [[tensor.clone() for tensor in layer] for layer in pool.layers]
    pool.extend(3)
    assert (pool.num_pages, pool.allocator.num_free) == (5, 3)
    for layer, kept in zip(pool.layers, before, strict=True):
        for tensor, old in zip(layer, kept, strict=True):
            assert tensor.shape[0] == 20
            assert torch.equal(tensor[:8], old)


class PageMachine(RuleBasedStateMachine):
    """Sequences that grow, shrink and end in any order; beside them a plain record of who has how many pages."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(9)
        self.caches: list[SequenceCache] = []

    @rule(capacity=st.integers(1, 36))
    def open(self, capacity: int) -> None:
        self.caches.append(SequenceCache(self.pool, capacity))

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        cache = data.draw(st.sampled_from(self.caches))
        most = min(cache.capacity, 4 * (len(cache.pages) + self.pool.allocator.num_free))
        cache.resize(data.draw(st.integers(0, most)))

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        cache = data.draw(st.sampled_from(self.caches))
        cache.close()
        self.caches.remove(cache)

    @invariant()
    def each_page_has_one_owner(self) -> None:
        taken = [page for cache in self.caches for page in cache.pages]
        assert len(taken) == len(set(taken))
        assert self.pool.allocator.num_free == 9 - len(taken)
        assert set(taken) <= set(range(9))

    def teardown(self) -> None:
        for cache in self.caches:
            cache.close()
        assert self.pool.allocator._list_gaps() == [range(9)]


TestPageMachine = PageMachine.TestCase
TestPageMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
