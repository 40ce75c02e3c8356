"""PhiMoE: norms with mean and bias, sparse-mixer weights of two experts.

Its longrope is run within the original context, where all implementations agree; see `LongRopeScaling`.
"""

from __future__ import annotations

from typing import Any

from moesys.models.config import DecoderConfig
from moesys.models.families.family import Family, require
from moesys.models.families.keys import (
    Keys,
    find_attention,
    find_moe,
    read_attention,
    read_decoder,
    read_head_dim,
    repeat,
    write_attention,
    write_decoder,
)
from moesys.models.families.mixtral import NUMBERED
from moesys.models.families.rope_keys import read_rope
from moesys.models.layout import Layout, MoELayout, StackedExperts
from moesys.models.norm import NormConfig, NormKind
from moesys.moe import MoEConfig, SparseMixer


def _read_phimoe(keys: Keys) -> DecoderConfig:
    top_k = keys["num_experts_per_tok"]
    require(top_k == 2, f"num_experts_per_tok ({top_k}) must be 2, as the family's routing is made for two")
    moe = MoEConfig(
        num_experts=keys["num_local_experts"],
        top_k=top_k,
        intermediate_size=keys["intermediate_size"],
        weighting=SparseMixer(keys.get("router_jitter_noise", 0.01)),
    )
    bias = keys.get("attention_bias", False)
    rope = read_rope(keys, read_head_dim(keys), theta=1e6)
    attention = read_attention(
        keys, rope, qkv_bias=bias, output_bias=bias, sliding_window=keys.get("sliding_window")
    )
    return read_decoder(
        keys,
        repeat(attention, keys),
        (moe,) * keys["num_hidden_layers"],
        norm=NormConfig(keys["rms_norm_eps"], NormKind.LAYER),
        head_bias=keys.get("lm_head_bias", False),
    )


def _write_phimoe(config: DecoderConfig) -> dict[str, Any]:
    moe, attention = find_moe(config), find_attention(config)
    weighting = moe.weighting
    require(isinstance(weighting, SparseMixer), f"its weights are a sparse mixer's, the model's {weighting}")
    assert isinstance(weighting, SparseMixer)
    return {
        **write_decoder(config),
        **write_attention(config),
        "attention_bias": attention.qkv_bias,
        "sliding_window": attention.sliding_window,
        "lm_head_bias": config.head_bias,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "intermediate_size": moe.intermediate_size,
        "router_jitter_noise": weighting.epsilon,
        "input_jitter_noise": 0.0,
    }


PHIMOE = Family(
    ("phimoe",),
    "PhimoeForCausalLM",
    Layout(
        (
            MoELayout("block_sparse_moe", NUMBERED),
            MoELayout("mlp", StackedExperts(), router="router.weight"),
            MoELayout("mlp", NUMBERED, router="router.weight"),
        )
    ),
    _read_phimoe,
    _write_phimoe,
    "LayerNorm with biases; SparseMixer routing; runs within the length before LongRoPE stretches it",
)
