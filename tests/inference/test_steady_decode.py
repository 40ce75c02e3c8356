"""Decoding goes on in the memory that it has: no step allocates pages or scratch, and none more than another."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesys.inference import Engine, SequenceStep
from moesys.models import AttentionConfig, Decoder, DecoderConfig, RopeConfig, initialize_weights
from moesys.moe import MoEConfig

NUM_TOKENS, NUM_LAYERS, NUM_HEADS = 1000, 2, 4


class AllocationMeter(TorchDispatchMode):
    """Adds up the bytes of tensors that do not lie in memory of their operation's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.num_bytes += leaf.untyped_storage().nbytes()
        return result


def make_engine(dtype: torch.dtype, window: int | None) -> Engine:
    mixer = AttentionConfig(NUM_HEADS, 2, 16, RopeConfig(16), sliding_window=window)
    model = Decoder(
        DecoderConfig(50, 32, (mixer,) * NUM_LAYERS, (MoEConfig(4, 2, 16),) * NUM_LAYERS, max_positions=2000)
    )
    initialize_weights(model, 0, std=0.3)
    return Engine(model.to(dtype).eval().requires_grad_(False))


def find_places(engine: Engine) -> list[int]:
    tensors = [tensor for layer in engine._pool.layers for tensor in layer]
    return [tensor.data_ptr() for tensor in (*tensors, engine._reader._scratch)]


@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 64)]
)
def test_a_thousand_tokens_allocate_alike(dtype: torch.dtype, window: int | None) -> None:
    engine = make_engine(dtype, window)
    sequence = engine.open_sequence(100 + NUM_TOKENS)
    engine.step([SequenceStep(sequence, 0, [1] * 100)])
    places, per_token, num_blocks = find_places(engine), [], []
    for position in range(100, 100 + NUM_TOKENS):
        step = [SequenceStep(sequence, position, [position % 50])]
        if position % 20:
            engine.step(step)
            continue
        with AllocationMeter() as meter:
            engine.step(step)
        per_token.append(meter.num_bytes)
        num_blocks.append(sys.getallocatedblocks())
    assert find_places(engine) == places
    assert min(per_token) > 1000
    # Scores, their pieces joined and weights: float32 per head and token seen.
    scores = 0 if window else 4 * NUM_TOKENS * NUM_HEADS * 4 * NUM_LAYERS
    assert max(per_token) - min(per_token) <= scores
    assert max(num_blocks[25:]) - max(num_blocks[5:25]) < 200
