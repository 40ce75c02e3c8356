"""gpt-oss: attention sinks, every second layer with a window, clamped SwiGLU experts with biases, MXFP4 weights."""

from __future__ import annotations

from typing import Any

from moesys.kernels import Activation, ExpertForm
from moesys.models.config import DecoderConfig
from moesys.models.families.family import Family
from moesys.models.families.keys import (
    Keys,
    find_attention,
    find_moe,
    read_attention,
    read_decoder,
    read_equal_moe,
    read_head_dim,
    read_layer_types,
    slide,
    write_attention,
    write_decoder,
    write_equal_moe,
    write_window,
)
from moesys.models.families.rope_keys import read_rope
from moesys.models.layout import InterleavedExperts, Layout, MoELayout
from moesys.models.stored import Encoding
from moesys.moe import Normalization

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_gpt_oss(keys: Keys) -> DecoderConfig:
    moe = read_equal_moe(
        keys,
        weighting=Normalization.BEFORE,
        router_bias=True,
        form=ExpertForm(
            Activation.CLAMPED_SWIGLU, keys.get("swiglu_limit", 7.0), keys.get("swiglu_alpha", 1.702)
        ),
        expert_bias=True,
    )
    bias = keys.get("attention_bias", True)
    rope = read_rope(keys, read_head_dim(keys), theta=150000.0, default=_ROPE)
    attention = read_attention(keys, rope, qkv_bias=bias, output_bias=bias, has_sinks=True)
    num_layers = keys["num_hidden_layers"]
    slides = read_layer_types(keys) or [i % 2 == 0 for i in range(num_layers)]
    mixers = slide(attention, slides, keys.get("sliding_window", 128))
    return read_decoder(keys, mixers, (moe,) * num_layers)


def _write_gpt_oss(config: DecoderConfig) -> dict[str, Any]:
    moe = find_moe(config)
    return {
        **write_decoder(config),
        **write_attention(config),
        **write_window(config),
        "attention_bias": find_attention(config).qkv_bias,
        **write_equal_moe(config),
        "swiglu_limit": moe.form.limit,
        "swiglu_alpha": moe.form.alpha,
    }


GPT_OSS = Family(
    ("gpt_oss",),
    "GptOssForCausalLM",
    Layout(
        tuple(
            MoELayout("mlp", InterleavedExperts(encoding), router="router.weight")
            for encoding in (Encoding.PLAIN, Encoding.MXFP4)
        )
    ),
    _read_gpt_oss,
    _write_gpt_oss,
    "attention sinks; every second layer has a window; clamped SwiGLU experts and router with biases",
)
