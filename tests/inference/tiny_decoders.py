"""Decoders and tokenizers small enough for a plain forward pass over everything as the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models
from torch import Tensor

from moesys.data import Tokenizer
from moesys.data.tokenizer import train_tokenizer
from moesys.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    DenseConfig,
    DocumentAttend,
    LatentAttentionConfig,
    MixerConfig,
    QKNorm,
    RopeConfig,
    initialize_weights,
)
from moesys.moe import MoEConfig, Normalization

VOCAB = 31
MAX_POSITIONS = 24


LATENT = LatentAttentionConfig(
    num_heads=4,
    query_rank=None,
    latent_rank=5,
    nope_head_dim=4,
    value_head_dim=3,
    rope=RopeConfig(2, is_interleaved=True),
)

WIDE_LATENT = replace(LATENT, latent_rank=96, nope_head_dim=64, value_head_dim=48)
"""Sums that are long enough for another order to change their bits, in bfloat16 too."""


def make_decoder(*, vocab_size: int = VOCAB, max_positions: int = MAX_POSITIONS, **attention: Any) -> Decoder:
    sizes: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "rope": RopeConfig(6),
        "qk_norm": QKNorm.PER_HEAD,
    } | attention
    return make_decoder_of((AttentionConfig(**sizes),) * 3, vocab_size, max_positions)


def make_decoder_of(
    mixers: tuple[MixerConfig, MixerConfig, MixerConfig],
    vocab_size: int = VOCAB,
    max_positions: int = MAX_POSITIONS,
) -> Decoder:
    layers = (MoEConfig(4, 2, 8), DenseConfig(12), MoEConfig(3, 1, 8, weighting=Normalization.NONE))
    model = Decoder(DecoderConfig(vocab_size, 16, mixers, layers, max_positions=max_positions))
    initialize_weights(model, 0, std=0.4)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks_H"):
            parameter.data.normal_(generator=generator)
    return model.eval()


def make_mixed_decoder() -> Decoder:
    """Sinks with a window, a latent, and sinks without a window: caches of different shapes and views."""
    sinks = AttentionConfig(4, 2, 6, RopeConfig(4), has_sinks=True, sliding_window=4)
    return make_decoder_of((sinks, LATENT, replace(sinks, sliding_window=None)))


@torch.no_grad()
def compute_full_logits(model: Decoder, token_ids: Sequence[int]) -> Tensor:
    """(tokens, vocabulary) logits of one pass over everything, without a cache."""
    positions = torch.arange(len(token_ids))[None]
    hidden = model(torch.tensor([list(token_ids)]), positions, DocumentAttend(None)).hidden_BSD
    return model.compute_logits(hidden[0])


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Numeric equality of fp32."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def make_tokenizer() -> Tokenizer:
    return train_tokenizer(["to be or not to be", "User: hello\nAssistant: hi", "日本 🙂🙃"] * 4, 300)


def make_llama_like_tokenizer() -> tokenizers.Tokenizer:
    """Decodes as Mixtral's does: byte tokens (id 1 + byte), a marked space, and the first space dropped."""
    words = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁is", "▁x"]
    vocab = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner
