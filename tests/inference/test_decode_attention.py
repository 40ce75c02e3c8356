"""Attention of one token over pages: the float64 definition, for every dtype, window, sink and place of pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesys.inference.decode_attention import PIECE_TOKENS, PieceReader, attend_one
from moesys.inference.kv_cache import SequenceCache
from moesys.inference.pages import PagePool
from moesys.models import AttentionConfig, RopeConfig

NUM_HEADS, NUM_KV_HEADS, SIZE = 6, 2, 8
MIXER = AttentionConfig(NUM_HEADS, NUM_KV_HEADS, SIZE, RopeConfig(SIZE))


def fill(length: int, dtype: torch.dtype, pages: list[int] | None = None) -> tuple[PagePool, SequenceCache]:
    """A sequence of ``length`` tokens, equal for equal lengths wherever its pages lie; all other memory is NaN."""
    num_pages = -(-length // 64)
    pool = PagePool((MIXER,), num_pages + 3, dtype=dtype, device=torch.device("cpu"))
    cache = SequenceCache(pool, num_pages * 64)
    cache.resize(length)
    if pages is not None:
        cache.pages = pages
    generator = torch.Generator().manual_seed(length)
    rows = [row for run in cache.find_runs(0, length) for row in range(run.start, run.stop)]
    for tensor in pool.layers[0]:
        tensor.fill_(torch.nan)
        tensor[rows] = torch.randn(length, NUM_KV_HEADS, SIZE, generator=generator).to(dtype)
    return pool, cache


def make_query() -> Tensor:
    return torch.randn(NUM_HEADS, SIZE, generator=torch.Generator().manual_seed(1))


def attend(
    pool: PagePool, cache: SequenceCache, first: int, length: int, sinks_H: Tensor | None = None
) -> Tensor:
    reader = PieceReader(pool.widths, pool.device)
    return attend_one(make_query(), *pool.layers[0], cache.find_pieces(first, length), sinks_H, reader)


def compute_oracle(
    pool: PagePool, cache: SequenceCache, first: int, length: int, sinks_H: Tensor | None = None
) -> Tensor:
    """The definition, head by head in float64."""
    rows = [row for run in cache.find_runs(first, length) for row in range(run.start, run.stop)]
    keys, values = (tensor[rows].double() for tensor in pool.layers[0])
    outputs: list[Tensor] = []
    for head, q_D in enumerate(make_query().double()):
        group = head // (NUM_HEADS // NUM_KV_HEADS)
        weights = (keys[:, group] @ q_D).exp()
        total = weights.sum() + (0 if sinks_H is None else sinks_H[head].double().exp())
        outputs.append((weights / total) @ values[:, group])
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(
    ("first", "length"),
    [(0, 1), (0, 63), (0, 65), (7, 200), (64, 65), (0, PIECE_TOKENS), (0, PIECE_TOKENS + 1), (100, 1500)],
)
def test_it_is_the_definition(first: int, length: int, has_sinks: bool, dtype: torch.dtype) -> None:
    pool, cache = fill(length, dtype)
    sinks_H = torch.linspace(-1, 3, NUM_HEADS) if has_sinks else None
    found = attend(pool, cache, first, length, sinks_H)
    assert found.dtype == torch.float32
    expected = compute_oracle(pool, cache, first, length, sinks_H)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [130, 700])
def test_the_places_of_pages_change_no_bit(length: int, dtype: torch.dtype) -> None:
    num_pages = -(-length // 64)
    places = (
        list(range(num_pages)),
        list(range(3, num_pages + 3)),
        list(range(num_pages))[::-1],
        [*range(2, num_pages + 1), 0],
    )
    for first in (0, 9):
        straight, *others = (attend(*fill(length, dtype, pages), first, length) for pages in places)
        assert all(torch.equal(other, straight) for other in others)


def test_scratch_memory_is_allocated_once() -> None:
    pool, cache = fill(1500, torch.bfloat16)
    reader = PieceReader(pool.widths, pool.device)
    assert reader.num_bytes == PIECE_TOKENS * NUM_KV_HEADS * SIZE * 4
    places = {reader.read(pool.layers[0][0], piece).data_ptr() for piece in cache.find_pieces(0, 1500)}
    assert len(places) == 1


def test_one_run_of_float32_is_read_in_place() -> None:
    pool, cache = fill(200, torch.float32)
    keys = pool.layers[0][0]
    (piece,) = cache.find_pieces(70, 200)
    read = PieceReader(pool.widths, pool.device).read(keys, piece)
    assert read.data_ptr() == keys[70].data_ptr()
