"""What a step is said to need is no less than what it is measured to need, and not many times more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from moesys.inference.decode_attention import PIECE_TOKENS
from moesys.inference.step_memory import compute_step_bytes
from moesys.models import AttentionConfig, DecoderConfig, RopeConfig
from moesys.moe import MoEConfig
from peak_memory import MEASURE_PEAK

SCRIPT = (
    MEASURE_PEAK
    + """
import json, torch
from moesys.inference import Engine, SequenceStep
from moesys.inference.step_memory import compute_step_bytes
from moesys.models import (
    AttentionConfig, Decoder, DecoderConfig, DenseConfig, LatentAttentionConfig, RopeConfig, initialize_weights
)
from moesys.moe import MoEConfig

torch.set_num_threads(1)
ROPE = RopeConfig(32)
MIXERS = {
    "grouped": AttentionConfig(8, 2, 32, ROPE),
    "window": AttentionConfig(8, 8, 32, ROPE, sliding_window=700),
    "sinks": AttentionConfig(8, 8, 32, ROPE, has_sinks=True),
    "latent": LatentAttentionConfig(8, None, 64, 32, 32, ROPE),
}

def measure(model, lengths, num_new):
    engine = Engine(model)
    steps = []
    for length, new in zip(lengths, num_new):
        sequence = engine.open_sequence(length)
        cache = engine._caches[sequence]
        cache.resize(length)
        cache.pages.reverse()
        cache.length = length - new
        steps.append(SequenceStep(sequence, length - new, [3] * new, num_logits=1))
    for layer in engine._pool.layers:
        for tensor in layer:
            tensor.normal_()
    before = read_resident()
    _, peak = measure_peak(lambda: engine.step(steps))
    bound = compute_step_bytes(
        model.config, sum(num_new), max(lengths), model.embedding.weight.element_size(), len(lengths)
    )
    return peak - before, bound

found = {}
for name, mixer in MIXERS.items():
    for dtype in (torch.float32, torch.bfloat16) if name == "sinks" else (torch.float32,):
        layers = (MoEConfig(16, 4, 128),) * 2
        model = Decoder(DecoderConfig(8000, 256, (mixer,) * 2, layers, tie_embeddings=False, max_positions=8192))
        initialize_weights(model, 0, std=0.1)
        model.to(dtype).eval().requires_grad_(False)
        measure(model, [8], [8])
        for case, lengths, num_new in (
            ("512 tokens", [2048], [512]),
            ("1280 tokens", [2048], [1280]),
            ("a piece beside 16", [1024] * 17, [512] + [1] * 16),
        ):
            found[f"{name} {dtype} {case}"] = measure(model, lengths, num_new)
for name, layer in (
    ("dense", DenseConfig(4096)),
    ("dense with a bias", DenseConfig(4096, bias=True)),
    ("narrow dense", DenseConfig(64)),
    ("shared", MoEConfig(4, 1, 8, shared_intermediate_size=4096)),
):
    for dtype in (torch.float32, torch.bfloat16):
        config = DecoderConfig(100, 256, (MIXERS["window"],), (layer,), max_positions=8192)
        model = Decoder(config)
        initialize_weights(model, 0, std=0.1)
        model.to(dtype).eval().requires_grad_(False)
        measure(model, [8], [8])
        found[f"{name} {dtype}"] = measure(model, [512], [512])
print(json.dumps(found))
"""
)


def test_the_bound_holds_what_is_measured() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        # What is freed is given back at once, so that each measurement starts anew.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(result.stdout)
    assert len(found) == 23
    for case, (measured, bound) in found.items():
        assert measured > 2**20, case
        assert measured <= bound <= 8 * measured, (case, measured, bound)


def make_config(**attention: int) -> DecoderConfig:
    mixer = AttentionConfig(4, 2, 8, RopeConfig(8), **attention)
    return DecoderConfig(300, 32, (mixer,) * 2, (MoEConfig(8, 2, 24),) * 2, max_positions=1000)


@pytest.mark.parametrize(
    ("num_tokens", "num_positions", "num_sequences", "widest"),
    [(3, 10, 1, "logits"), (64, 20, 1, "feed_forward"), (64, 900, 1, "mixing"), (64, 64, 90, "logits")],
)
def test_a_bound_by_hand(num_tokens: int, num_positions: int, num_sequences: int, widest: str) -> None:
    """Of bfloat16: 2 experts of 3 * 24 inner and 2 * 32 outer numbers per token, 6 * 8 of the router and 32 of the
    result, in float32."""
    config = make_config()
    stream, masks = num_tokens * 32 * (4 * 2 + 2 * 4), num_tokens * num_positions * (2 * 2 + 2)
    scratch = PIECE_TOKENS * 16 * 4
    parts = {
        "mixing": 4 * config.mixers[0].count_step_elements(num_tokens, num_positions)
        + num_positions * 32 * 2
        + masks,
        "feed_forward": num_tokens * (2 * (72 + 64) + 48 + 32) * 4 + masks,
        "logits": 300 * (num_sequences * 6 + 40),
    }
    assert parts[widest] == max(parts.values())
    found = compute_step_bytes(config, num_tokens, num_positions, 2, num_sequences)
    assert found == stream + scratch + parts[widest]


def test_a_bound_grows_with_all_that_it_depends_on() -> None:
    config = make_config()
    base = compute_step_bytes(config, 64, 900, 2)
    assert compute_step_bytes(config, 65, 900, 2) > base
    assert compute_step_bytes(config, 64, 1000, 2) > base
    assert compute_step_bytes(config, 64, 900, 4) > base
    assert compute_step_bytes(config, 64, 900, 2, num_sequences=640) > base
