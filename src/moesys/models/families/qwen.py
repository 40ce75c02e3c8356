"""Qwen3 (dense), Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from moesys.models.attention import QKNorm
from moesys.models.config import DecoderConfig, DenseConfig
from moesys.models.families.family import Family
from moesys.models.families.keys import (
    FeedForwards,
    Keys,
    find_attention,
    find_dense,
    find_moe,
    read_attention,
    read_decoder,
    read_layer_types,
    repeat,
    slide,
    write_attention,
    write_decoder,
    write_window,
)
from moesys.models.families.llama import read_dense, write_dense
from moesys.models.layout import Layout, MoELayout, SeparateExperts, StackedExperts
from moesys.moe import MoEConfig, Normalization

NORMALIZATIONS = {True: Normalization.AFTER, False: Normalization.NONE}


def _read_window(keys: Keys) -> int | None:
    return keys.get("sliding_window") if keys.get("use_sliding_window") else None


def _read_qwen3(keys: Keys) -> DecoderConfig:
    bias = keys.get("attention_bias", False)
    attention = read_attention(
        {"head_dim": 128, **keys}, qk_norm=QKNorm.PER_HEAD, qkv_bias=bias, output_bias=bias
    )
    window, first = _read_window(keys), keys.get("max_window_layers", 28)
    slides = read_layer_types(keys) or [i >= first for i in range(keys["num_hidden_layers"])]
    return read_decoder(keys, slide(attention, slides, window), read_dense(keys))


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    window = write_window(config)
    return {
        **write_decoder(config),
        **write_attention(config),
        **write_dense(config),
        **window,
        "use_sliding_window": window["sliding_window"] is not None,
        "attention_bias": find_attention(config).qkv_bias,
    }


def _read_sparse_layers(keys: Keys, moe: MoEConfig) -> FeedForwards:
    """Dense layers where ``mlp_only_layers`` or ``decoder_sparse_step`` say so."""
    dense = DenseConfig(keys["intermediate_size"])
    dense_ids, step = keys.get("mlp_only_layers") or [], keys.get("decoder_sparse_step", 1)
    return tuple(dense if i in dense_ids or (i + 1) % step else moe for i in range(keys["num_hidden_layers"]))


def _write_sparse_layers(config: DecoderConfig) -> dict[str, Any]:
    moe, dense = find_moe(config), find_dense(config)
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.weighting is Normalization.AFTER,
        "intermediate_size": moe.intermediate_size if dense is None else dense.intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.num_layers) if i not in config.moe_layer_ids],
    }


def _read_moe(keys: Keys, **options: Any) -> MoEConfig:
    return MoEConfig(
        num_experts=keys.get("num_experts") or keys["num_local_experts"],
        top_k=keys["num_experts_per_tok"],
        intermediate_size=keys["moe_intermediate_size"],
        weighting=NORMALIZATIONS[keys.get("norm_topk_prob", False)],
        **options,
    )


def _read_qwen2_moe(keys: Keys) -> DecoderConfig:
    moe = _read_moe(
        keys, shared_intermediate_size=keys["shared_expert_intermediate_size"], shared_expert_gate=True
    )
    attention = read_attention(keys, qkv_bias=keys.get("qkv_bias", True))
    window, last = _read_window(keys), keys.get("max_window_layers", 28)
    slides = read_layer_types(keys) or [i % 2 == 0 and i < last for i in range(keys["num_hidden_layers"])]
    return read_decoder(keys, slide(attention, slides, window), _read_sparse_layers(keys, moe))


def _write_qwen2_moe(config: DecoderConfig) -> dict[str, Any]:
    window = write_window(config)
    return {
        **write_decoder(config),
        **write_attention(config),
        **_write_sparse_layers(config),
        **window,
        "use_sliding_window": window["sliding_window"] is not None,
        "qkv_bias": find_attention(config).qkv_bias,
        "shared_expert_intermediate_size": find_moe(config).shared_intermediate_size,
    }


def _read_qwen3_moe(keys: Keys) -> DecoderConfig:
    bias = keys.get("attention_bias", False)
    attention = read_attention(
        keys,
        qk_norm=QKNorm.PER_HEAD,
        qkv_bias=bias,
        output_bias=bias,
        sliding_window=_read_window(keys),
    )
    return read_decoder(keys, repeat(attention, keys), _read_sparse_layers(keys, _read_moe(keys)))


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    attention = find_attention(config)
    return {
        **write_decoder(config),
        **write_attention(config),
        **_write_sparse_layers(config),
        "num_local_experts": find_moe(config).num_experts,
        "attention_bias": attention.qkv_bias,
        "use_sliding_window": attention.sliding_window is not None,
        "sliding_window": attention.sliding_window,
    }


_MOE = Layout((MoELayout("mlp", SeparateExperts()), MoELayout("mlp", StackedExperts())))

QWEN3 = Family(
    ("qwen3",),
    "Qwen3ForCausalLM",
    Layout(),
    _read_qwen3,
    _write_qwen3,
    "dense; queries and keys normalised per head; windows in some layers",
)
QWEN2_MOE = Family(
    ("qwen2_moe",),
    "Qwen2MoeForCausalLM",
    _MOE,
    _read_qwen2_moe,
    _write_qwen2_moe,
    "a gated shared expert; biases on queries, keys and values; dense layers and windows in some layers",
)
QWEN3_MOE = Family(
    ("qwen3_moe",),
    "Qwen3MoeForCausalLM",
    _MOE,
    _read_qwen3_moe,
    _write_qwen3_moe,
    "queries and keys normalised per head; dense layers where the config has them",
)
