"""The mixer of a block: the part that lets tokens see each other. Another kind is one record and one module more."""

from __future__ import annotations

from moesys.models.attention import Attention
from moesys.models.config import AttentionConfig, DecoderConfig
from moesys.models.latent_attention import LatentAttention

Mixer = Attention | LatentAttention
"""Takes (batch, sequence, hidden), a `Rotation` and an `Attend`; returns (batch, sequence, hidden)."""


def make_mixer(config: DecoderConfig, layer_id: int) -> Mixer:
    """Makes the mixer that the decoder's config describes for a layer."""
    mixer = config.mixers[layer_id]
    if isinstance(mixer, AttentionConfig):
        return Attention(config.hidden_size, mixer, config.norm.epsilon, layer_id)
    return LatentAttention(config.hidden_size, mixer, layer_id)
