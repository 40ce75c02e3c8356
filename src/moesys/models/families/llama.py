"""Llama and Mistral: dense SwiGLU layers, grouped-query attention."""

from __future__ import annotations

from typing import Any

from moesys.models.config import DecoderConfig, DenseConfig
from moesys.models.families.family import Family, require
from moesys.models.families.keys import (
    FeedForwards,
    Keys,
    find_attention,
    find_dense,
    read_attention,
    read_decoder,
    repeat,
    write_attention,
    write_decoder,
)
from moesys.models.layout import Layout


def read_dense(keys: Keys, **options: Any) -> FeedForwards:
    """The same dense layer everywhere."""
    return (DenseConfig(keys["intermediate_size"], **options),) * keys["num_hidden_layers"]


def write_dense(config: DecoderConfig) -> dict[str, Any]:
    """The key that `read_dense` reads; raises `ModelFormatError` for a model with MoE layers."""
    dense = find_dense(config)
    require(dense is not None and not config.moe_layer_ids, "its layers are dense, the model has MoE layers")
    assert dense is not None
    return {"intermediate_size": dense.intermediate_size}


def _read_llama(keys: Keys) -> DecoderConfig:
    bias = keys.get("attention_bias", False)
    attention = read_attention(keys, qkv_bias=bias, output_bias=bias)
    return read_decoder(keys, repeat(attention, keys), read_dense(keys, bias=keys.get("mlp_bias", False)))


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    dense = find_dense(config)
    return {
        **write_decoder(config),
        **write_attention(config),
        **write_dense(config),
        "attention_bias": find_attention(config).qkv_bias,
        "mlp_bias": dense is not None and dense.bias,
    }


def _read_mistral(keys: Keys) -> DecoderConfig:
    attention = read_attention(keys, sliding_window=keys.get("sliding_window", 4096))
    return read_decoder(keys, repeat(attention, keys), read_dense(keys))


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        **write_attention(config),
        **write_dense(config),
        "sliding_window": find_attention(config).sliding_window,
    }


LLAMA = Family(("llama",), "LlamaForCausalLM", Layout(), _read_llama, _write_llama, "dense")
MISTRAL = Family(
    ("mistral",),
    "MistralForCausalLM",
    Layout(),
    _read_mistral,
    _write_mistral,
    "dense; a window in every layer",
)
