"""What recurrent mixers keep of a sequence: its own, final when its step is, and never taken back by halves."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import make_decoder
from torch import Tensor

from moesys.errors import GenerationError
from moesys.inference import Engine, SequenceStep
from moesys.inference.decode_attention import PieceReader
from moesys.inference.kv_cache import CachedAttend, SequenceCache, Span
from moesys.inference.pages import PagePool
from moesys.models.attend import State


def sum_up(x_SW: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Running sums."""
    y_SW = x_SW.cumsum(0) + (0 if state is None else state[0])
    return y_SW, (y_SW[-1],)


def run(pool: PagePool, caches: list[SequenceCache], pieces: list[Tensor], *, commits: bool = True) -> Tensor:
    """One step of new tokens per sequence."""
    spans, start = [], 0
    for cache, piece in zip(caches, pieces, strict=True):
        cache.resize(cache.length + len(piece))
        spans.append(Span(cache, start, start + len(piece), cache.length))
        start += len(piece)
    attend = CachedAttend(pool, spans, PieceReader([], pool.device))
    y_SW = attend.scan(0, torch.cat(pieces)[None], sum_up)[0]
    if commits:
        attend.commit()
    return y_SW


def test_each_sequence_goes_on_from_its_own_state() -> None:
    pool = PagePool((), 4, dtype=torch.float32, device=torch.device("cpu"))
    first, second = SequenceCache(pool, 20), SequenceCache(pool, 20)
    x_SW, other_SW = torch.arange(12.0).view(6, 2), torch.arange(100.0, 108).view(4, 2)
    found = [run(pool, [second, first], [other_SW[:2], x_SW[:3]])[2:]]
    run(pool, [first], [x_SW[3:]], commits=False)
    found += [run(pool, [first, second], [x_SW[3:4], other_SW[2:]])[:1], run(pool, [first], [x_SW[4:]])]
    assert torch.equal(torch.cat(found), x_SW.cumsum(0))
    assert torch.equal(second.states[0][0], other_SW.sum(0))
    first.length = 0
    assert torch.equal(run(pool, [first], [x_SW]), x_SW.cumsum(0))


def test_a_state_cannot_be_taken_back_to_the_middle() -> None:
    engine = Engine(make_decoder())
    engine._is_recurrent = True
    sequence = engine.open_sequence(10)
    engine.step([SequenceStep(sequence, 0, [1, 2, 3])])
    with pytest.raises(GenerationError, match=r"start at 2 of 3, but a recurrent mixer .*; start at 0 or 3"):
        engine.step([SequenceStep(sequence, 2, [1])])
    engine.step([SequenceStep(sequence, 3, [1])])
    engine.step([SequenceStep(sequence, 0, [1])])
