"""A sequence's logits, in bits, whatever runs beside it and wherever its pages lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny_decoders import WIDE_LATENT
from torch import Tensor

from moesys.errors import GenerationError
from moesys.inference import Engine, SequenceStep
from moesys.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    MixerConfig,
    QKNorm,
    RopeConfig,
    initialize_weights,
)
from moesys.moe import MoEConfig

VOCAB, CONTEXT = 101, 640
GROUPED = AttentionConfig(8, 4, 16, RopeConfig(16), qk_norm=QKNorm.WHOLE)
MIXERS: dict[str, MixerConfig] = {
    "whole": AttentionConfig(4, 4, 16, RopeConfig(16)),
    "grouped": GROUPED,
    "window": replace(GROUPED, sliding_window=70),
    "sinks": replace(GROUPED, has_sinks=True, sliding_window=90),
    "latent": WIDE_LATENT,
}
CASES = [(name, dtype) for name in MIXERS for dtype in (torch.float32, torch.bfloat16)]


def make_model(mixer: MixerConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    config = DecoderConfig(VOCAB, 64, (mixer,) * 2, (MoEConfig(8, 2, 32),) * 2, max_positions=CONTEXT)
    model = Decoder(config)
    initialize_weights(model, 0, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def make_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run_beside(engine: Engine, num_neighbours: int, newcomer: int | None = None) -> Tensor:
    """The logits of three decoding steps of one sequence, which stands in the midst of others of other lengths.

    newcomer: tokens of a prompt that runs in the first of the steps, too.
    """
    lengths = [150, *(20 + 37 * n % 260 for n in range(num_neighbours))]
    ids = [engine.open_sequence(length + 3) for length in lengths]
    for seed, (sequence, length) in enumerate(zip(ids, lengths, strict=True)):
        engine.step([SequenceStep(sequence, 0, make_tokens(length, seed), num_logits=1)])
    found: list[Tensor] = []
    for i in range(3):
        steps = [SequenceStep(s, n + i, make_tokens(1, 7 * i + n)) for s, n in zip(ids, lengths, strict=True)]
        if newcomer is not None and i == 0:
            steps.insert(0, SequenceStep(engine.open_sequence(newcomer), 0, make_tokens(newcomer, 9)))
        half = len(steps) // 2
        order = [*steps[half:], *steps[:half]]
        logits = dict(zip((step.sequence_id for step in order), engine.step(order), strict=True))
        found.append(logits[ids[0]])
    return torch.cat(found)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_neighbours_change_no_bit(name: str, dtype: torch.dtype) -> None:
    model = make_model(MIXERS[name], dtype)
    alone = run_beside(Engine(model), 0)
    for num_neighbours in (1, 7, 31):
        assert torch.equal(run_beside(Engine(model), num_neighbours), alone), num_neighbours
    assert torch.equal(run_beside(Engine(model), 3, newcomer=100), alone)


def scatter(engine: Engine, num_sequences: int) -> None:
    """Leaves the free pages of an engine in no order."""
    ids = [engine.open_sequence(16) for _ in range(num_sequences)]
    for sequence in ids:
        engine.step([SequenceStep(sequence, 0, [1] * 16)])
    for sequence in ids[::2]:
        engine.close_sequence(sequence)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_the_places_of_pages_change_no_bit(name: str, dtype: torch.dtype) -> None:
    model = make_model(MIXERS[name], dtype)
    engine = Engine(model, num_pages=60, page_tokens=16)
    scatter(engine, 58)
    found = run_beside(engine, 2)
    assert max(len(cache.find_runs(0, cache.length)) for cache in engine._caches.values()) > 5
    assert torch.equal(found, run_beside(Engine(model, page_tokens=16), 2))
    assert torch.equal(found, run_beside(Engine(model), 2))


def step_all(engine: Engine, ids: Sequence[int], start: int, count: int) -> list[Tensor]:
    return engine.step([SequenceStep(i, start, make_tokens(count, i)) for i in ids])


def test_a_step_without_enough_pages_changes_nothing() -> None:
    engine = Engine(make_model(GROUPED), num_pages=4, page_tokens=8)
    first, second = engine.open_sequence(32), engine.open_sequence(32)
    engine.step([SequenceStep(first, 0, [1] * 16), SequenceStep(second, 0, [2] * 8)])
    for layer in engine._pool.layers:
        for tensor in layer:
            tensor[24:] = 0
    before = [[tensor.clone() for tensor in layer] for layer in engine._pool.layers]
    message = (
        rf"need 2 more pages of 8 tokens and 1 of 4 are free; held: sequence {first} 2, sequence {second} 1; "
        "close a sequence"
    )
    with pytest.raises(GenerationError, match=message):
        engine.step([SequenceStep(first, 16, [3]), SequenceStep(second, 8, [3])])
    for layer, kept in zip(engine._pool.layers, before, strict=True):
        assert all(torch.equal(tensor, old) for tensor, old in zip(layer, kept, strict=True))
    (alone,) = engine.step([SequenceStep(first, 16, [3])])
    engine.close_sequence(second)
    fresh = Engine(engine.model, page_tokens=8)
    sequence = fresh.open_sequence(32)
    fresh.step([SequenceStep(sequence, 0, [1] * 16)])
    assert torch.equal(fresh.step([SequenceStep(sequence, 16, [3])])[0], alone)


def test_tokens_taken_back_give_pages_back_to_the_same_step() -> None:
    engine = Engine(make_model(GROUPED), num_pages=4, page_tokens=8)
    first, second = engine.open_sequence(32), engine.open_sequence(32)
    engine.step([SequenceStep(first, 0, [1] * 24), SequenceStep(second, 0, [2] * 8)])
    engine.step([SequenceStep(second, 8, [3]), SequenceStep(first, 4, [1])])
    assert engine._pool.allocator.num_free == 1


def test_room_is_that_of_full_lengths() -> None:
    engine = Engine(make_model(GROUPED), num_pages=4, page_tokens=8)
    assert engine.has_room(32)
    assert not engine.has_room(33)
    sequence = engine.open_sequence(9)
    assert engine.has_room(16)
    assert not engine.has_room(17)
    engine.close_sequence(sequence)
    assert engine.has_room(32)
    with pytest.raises(
        GenerationError, match=r"needs 33 positions, the pages .* hold 32; .* or make more pages"
    ):
        engine.open_sequence(33)


def test_a_pool_without_a_size_grows_when_sequences_are_opened_and_never_in_a_step() -> None:
    model = make_model(GROUPED)
    engine = Engine(model, page_tokens=8)
    sequence = engine.open_sequence(20)
    (before,) = step_all(engine, [sequence], 0, 15)
    assert engine.kv_bytes == 24 * 2 * 2 * 64 * 4
    other = engine.open_sequence(8)
    assert engine.kv_bytes == 32 * 2 * 2 * 64 * 4
    places = [tensor.data_ptr() for layer in engine._pool.layers for tensor in layer]
    engine.step([SequenceStep(other, 0, [1] * 8), SequenceStep(sequence, 15, make_tokens(5, 3))])
    assert places == [tensor.data_ptr() for layer in engine._pool.layers for tensor in layer]
    (after,) = engine.step([SequenceStep(sequence, 0, make_tokens(15, sequence))])
    assert torch.equal(after, before)
    engine.close_sequence(sequence)
    engine.close_sequence(other)
    engine.make_room([8] * 5)
    assert engine.kv_bytes == 40 * 2 * 2 * 64 * 4
    for _ in range(5):
        engine.open_sequence(8)
    assert engine.kv_bytes == 40 * 2 * 2 * 64 * 4
    assert Engine(model, num_pages=0).kv_bytes == 0
