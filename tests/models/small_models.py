"""Decoders small enough for float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesys.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    DenseConfig,
    QKNorm,
    RopeConfig,
    initialize_weights,
)
from moesys.moe import MoEConfig

VOCAB = 23
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=6)
DENSE = DenseConfig(intermediate_size=10)


def make_config(
    *, feed_forwards: tuple[MoEConfig | DenseConfig, ...] = (MOE, DENSE), tie: bool = True, **attention: Any
) -> DecoderConfig:
    sizes: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "rope": RopeConfig(6),
        "qk_norm": QKNorm.PER_HEAD,
    }
    mixers = (AttentionConfig(**(sizes | attention)),) * len(feed_forwards)
    return DecoderConfig(VOCAB, 12, mixers, feed_forwards, tie_embeddings=tie)


def make_model(config: DecoderConfig | None = None, *, dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(make_config() if config is None else config)
    initialize_weights(model, seed=0, std=0.5)
    return model.to(dtype)


def make_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_positions(batch: int, length: int) -> Tensor:
    return torch.arange(length).expand(batch, length)
