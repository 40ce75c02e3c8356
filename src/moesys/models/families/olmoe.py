"""OLMoE."""

from __future__ import annotations

from typing import Any

from moesys.models.attention import QKNorm
from moesys.models.config import DecoderConfig
from moesys.models.families.family import Family
from moesys.models.families.keys import (
    Keys,
    find_attention,
    find_moe,
    read_attention,
    read_decoder,
    read_equal_moe,
    repeat,
    write_attention,
    write_decoder,
    write_equal_moe,
)
from moesys.models.families.qwen import NORMALIZATIONS
from moesys.models.layout import Layout, MoELayout, SeparateExperts, StackedExperts
from moesys.moe import Normalization


def _read_olmoe(keys: Keys) -> DecoderConfig:
    moe = read_equal_moe(
        keys,
        weighting=NORMALIZATIONS[keys.get("norm_topk_prob", False)],
    )
    bias = keys.get("attention_bias", False)
    attention = read_attention(
        keys, qk_norm=QKNorm.WHOLE, qkv_bias=bias, output_bias=bias, qkv_clip=keys.get("clip_qkv")
    )
    return read_decoder(keys, repeat(attention, keys), (moe,) * keys["num_hidden_layers"])


def _write_olmoe(config: DecoderConfig) -> dict[str, Any]:
    moe, attention = find_moe(config), find_attention(config)
    return {
        **write_decoder(config),
        **write_attention(config),
        "attention_bias": attention.qkv_bias,
        "clip_qkv": attention.qkv_clip,
        **write_equal_moe(config, "num_experts"),
        "norm_topk_prob": moe.weighting is Normalization.AFTER,
    }


OLMOE = Family(
    ("olmoe",),
    "OlmoeForCausalLM",
    Layout((MoELayout("mlp", SeparateExperts()), MoELayout("mlp", StackedExperts()))),
    _read_olmoe,
    _write_olmoe,
    "queries and keys normalised over the whole projection, and clipped where the config says",
)
