"""What a layer costs that has next to nothing to compute: the calls themselves, which a small model feels."""

from __future__ import annotations

import time

import torch

from moesys.models import AttentionConfig, Decoder, DecoderConfig, DocumentAttend
from moesys.models.rope import RopeConfig
from moesys.moe import MoEConfig

_NUM_LAYERS = 4
_NUM_STEPS = 20
_WIDTH = 64


def measure_layer_overhead() -> float:
    """Measures one token through layers of 8 tiny experts, in seconds per layer, the best of 20.

    Leaves torch's random state alone.
    """
    layer = MoEConfig(num_experts=8, top_k=2, intermediate_size=_WIDTH)
    mixer = AttentionConfig(
        num_heads=2, num_kv_heads=2, head_dim=_WIDTH // 2, rope=RopeConfig(dim=_WIDTH // 2)
    )
    config = DecoderConfig(_WIDTH, _WIDTH, (mixer,) * _NUM_LAYERS, (layer,) * _NUM_LAYERS)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = Decoder(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        execution = model.make_resident_execution()
        token, position = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
        times = []
        for _ in range(_NUM_STEPS):
            start = time.perf_counter()
            model(token, position, DocumentAttend(None), execution)
            times.append(time.perf_counter() - start)
    return min(times) / _NUM_LAYERS
