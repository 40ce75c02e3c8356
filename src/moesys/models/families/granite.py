"""Granite-MoE: multipliers on embedding, residuals, attention scores and logits."""

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
    repeat,
    write_attention,
    write_decoder,
    write_equal_moe,
)
from moesys.models.layout import Layout, MoELayout, StackedExperts
from moesys.moe import Normalization


def _read_granite_moe(keys: Keys) -> DecoderConfig:
    moe = read_equal_moe(
        keys,
        weighting=Normalization.BEFORE,
    )
    bias = keys.get("attention_bias", False)
    attention = read_attention(
        keys, qkv_bias=bias, output_bias=bias, softmax_scale=float(keys.get("attention_multiplier", 1.0))
    )
    return read_decoder(
        keys,
        repeat(attention, keys),
        (moe,) * keys["num_hidden_layers"],
        embedding_scale=float(keys.get("embedding_multiplier", 1.0)),
        residual_scale=float(keys.get("residual_multiplier", 1.0)),
        logit_divisor=float(keys.get("logits_scaling", 1.0)),
    )


def _write_granite_moe(config: DecoderConfig) -> dict[str, Any]:
    attention = find_attention(config)
    return {
        **write_decoder(config),
        **write_attention(config),
        "attention_bias": attention.qkv_bias,
        "attention_multiplier": attention.scale,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logit_divisor,
        **write_equal_moe(config),
    }


def _make_layout(gate_up: str, down: str, router: str) -> MoELayout:
    return MoELayout("block_sparse_moe", StackedExperts(gate_up, down), router=router)


GRANITE_MOE = Family(
    ("granitemoe",),
    "GraniteMoeForCausalLM",
    Layout(
        (
            _make_layout("input_linear.weight", "output_linear.weight", "router.layer.weight"),
            _make_layout("experts.gate_up_proj", "experts.down_proj", "router.weight"),
        )
    ),
    _read_granite_moe,
    _write_granite_moe,
    "constants scale embedding, attention, residuals and logits",
)
