"""Mixtral."""

from __future__ import annotations

from typing import Any

from moesys.models.config import DecoderConfig
from moesys.models.families.family import Family
from moesys.models.families.keys import (
    Keys,
    find_attention,
    read_attention,
    read_decoder,
    read_equal_moe,
    read_head_dim,
    repeat,
    write_attention,
    write_decoder,
    write_equal_moe,
)
from moesys.models.families.rope_keys import read_rope
from moesys.models.layout import Layout, MoELayout, SeparateExperts, StackedExperts

NUMBERED = SeparateExperts(gate="w1", up="w3", down="w2")
LAYOUT = Layout(
    (MoELayout("block_sparse_moe", NUMBERED), MoELayout("mlp", StackedExperts()), MoELayout("mlp", NUMBERED))
)


def _read_mixtral(keys: Keys) -> DecoderConfig:
    moe = read_equal_moe(keys)
    rope = read_rope(keys, read_head_dim(keys), theta=1e6)
    attention = read_attention(keys, rope, sliding_window=keys.get("sliding_window"))
    return read_decoder(keys, repeat(attention, keys), (moe,) * keys["num_hidden_layers"])


def _write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        **write_attention(config),
        "sliding_window": find_attention(config).sliding_window,
        **write_equal_moe(config),
        "router_jitter_noise": 0.0,
    }


MIXTRAL = Family(
    ("mixtral",),
    "MixtralForCausalLM",
    LAYOUT,
    _read_mixtral,
    _write_mixtral,
    "the weights of a token's experts sum to one; a window in every layer",
)
