"""DeepSeek-V2, DeepSeek-V3 (also Kimi-K2) and GLM-4-MoE, which shares V3's routing.

Layers for predicting further tokens, stored behind the last one, are not part of the model.
"""

from __future__ import annotations

from typing import Any

import torch

from moesys.errors import ModelFormatError
from moesys.models.attention import QKNorm
from moesys.models.config import DecoderConfig, DenseConfig
from moesys.models.families.family import Family, require
from moesys.models.families.keys import (
    FeedForwards,
    Keys,
    find_attention,
    find_dense,
    find_moe,
    read_attention,
    read_decoder,
    read_head_dim,
    repeat,
    write_attention,
    write_decoder,
)
from moesys.models.families.qwen import NORMALIZATIONS
from moesys.models.families.rope_keys import read_rope, write_rope
from moesys.models.latent_attention import LatentAttentionConfig
from moesys.models.layout import Layout, MoELayout, SeparateExperts, StackedExperts
from moesys.models.rope import RopeConfig, YarnScaling, compute_mscale
from moesys.moe import GroupScore, MoEConfig, Normalization, Score


def _read_latent_attention(keys: Keys, *, is_interleaved: bool) -> LatentAttentionConfig:
    rope = read_rope(keys, keys["qk_rope_head_dim"], is_interleaved=is_interleaved)
    heads = keys["num_attention_heads"]
    kv_heads = keys.get("num_key_value_heads") or heads
    require(kv_heads == heads, f"num_key_value_heads ({kv_heads}) must be num_attention_heads ({heads})")
    return LatentAttentionConfig(
        num_heads=heads,
        query_rank=keys.get("q_lora_rank"),
        latent_rank=keys["kv_lora_rank"],
        nope_head_dim=keys["qk_nope_head_dim"],
        value_head_dim=keys["v_head_dim"],
        rope=rope,
        bias=keys.get("attention_bias", False),
        softmax_scale=_compute_softmax_scale(rope, keys["qk_nope_head_dim"]),
    )


def _compute_softmax_scale(rope: RopeConfig, nope_head_dim: int) -> float | None:
    """YaRN's temperature also sharpens the softmax where ``mscale_all_dim`` is given."""
    if not isinstance(rope.scaling, YarnScaling) or not rope.scaling.mscale_all_dim:
        return None
    mscale = compute_mscale(rope.scaling.factor, rope.scaling.mscale_all_dim)
    return (nope_head_dim + rope.dim) ** -0.5 * mscale**2


def _find_latent_attention(config: DecoderConfig) -> LatentAttentionConfig:
    mixer = config.mixers[0]
    if not isinstance(mixer, LatentAttentionConfig):
        raise ModelFormatError(f"its layers have latent attention, the model's have {mixer.kind}")
    return mixer


def _write_latent_attention(config: DecoderConfig) -> dict[str, Any]:
    mixer = _find_latent_attention(config)
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "q_lora_rank": mixer.query_rank,
        "kv_lora_rank": mixer.latent_rank,
        "qk_nope_head_dim": mixer.nope_head_dim,
        "qk_rope_head_dim": mixer.rope.dim,
        "v_head_dim": mixer.value_head_dim,
        "attention_bias": mixer.bias,
        "attention_dropout": 0.0,
        **write_rope(mixer.rope, config.max_positions),
    }


def _read_first_dense_layers(keys: Keys, moe: MoEConfig, default: int) -> FeedForwards:
    num_dense = keys.get("first_k_dense_replace", default)
    dense = DenseConfig(keys["intermediate_size"])
    return tuple(dense if i < num_dense else moe for i in range(keys["num_hidden_layers"]))


def _read_moe(keys: Keys, **options: Any) -> MoEConfig:
    require(not keys.get("mlp_bias"), "mlp_bias is not supported; only false is")
    width = keys["moe_intermediate_size"]
    groups = keys.get("n_group") or 1
    if groups > 1:
        options |= {"num_groups": groups, "top_groups": keys["topk_group"]}
    return MoEConfig(
        num_experts=keys["n_routed_experts"],
        top_k=keys["num_experts_per_tok"],
        intermediate_size=width,
        weight_scale=float(keys.get("routed_scaling_factor", 1.0)),
        shared_intermediate_size=(keys.get("n_shared_experts") or 0) * width,
        **options,
    )


def _write_moe(config: DecoderConfig) -> dict[str, Any]:
    moe, dense = find_moe(config), find_dense(config)
    num_shared, rest = divmod(moe.shared_intermediate_size, moe.intermediate_size)
    require(
        not rest,
        f"the shared expert's width ({moe.shared_intermediate_size}) must be a multiple of the experts' "
        f"({moe.intermediate_size})",
    )
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "n_shared_experts": num_shared,
        "routed_scaling_factor": moe.weight_scale,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.weighting is Normalization.AFTER,
        "first_k_dense_replace": config.moe_layer_ids[0],
        "intermediate_size": moe.intermediate_size if dense is None else dense.intermediate_size,
    }


def _read_v2(keys: Keys) -> DecoderConfig:
    method = keys.get("topk_method", "greedy")
    require(
        method in ("greedy", "group_limited_greedy"),
        f"topk_method {method!r} is not supported; 'greedy' and 'group_limited_greedy' are",
    )
    options: dict[str, Any] = {"weighting": Normalization.NONE}
    if method == "greedy":
        keys = {**keys, "n_group": 1}
    elif (keys.get("n_group") or 1) > 1:
        options["group_score"] = GroupScore.MAX
    moe = _read_moe(keys, **options)
    mixer = _read_latent_attention(keys, is_interleaved=True)
    layers = _read_first_dense_layers(keys, moe, default=0)
    return read_decoder(keys, (mixer,) * len(layers), layers)


def _write_v2(config: DecoderConfig) -> dict[str, Any]:
    moe = find_moe(config)
    return {
        **write_decoder(config),
        **_write_latent_attention(config),
        **_write_moe(config),
        "norm_topk_prob": False,
        "topk_method": "greedy" if moe.num_groups == 1 else "group_limited_greedy",
        "scoring_func": "softmax",
    }


def _read_v3_moe(keys: Keys) -> MoEConfig:
    return _read_moe(
        keys,
        score=Score.SIGMOID,
        weighting=NORMALIZATIONS[keys.get("norm_topk_prob", True)],
        selection_bias=True,
    )


def _read_v3(keys: Keys) -> DecoderConfig:
    mixer = _read_latent_attention(keys, is_interleaved=keys.get("rope_interleave", True))
    layers = _read_first_dense_layers(keys, _read_v3_moe(keys), default=3)
    return read_decoder(keys, (mixer,) * len(layers), layers)


def _write_v3(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        **_write_latent_attention(config),
        **_write_moe(config),
        "rope_interleave": _find_latent_attention(config).rope.is_interleaved,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }


def _read_glm4_moe(keys: Keys) -> DecoderConfig:
    head_dim = read_head_dim(keys)
    attention = read_attention(
        keys,
        read_rope(keys, head_dim, share=0.5),
        qk_norm=QKNorm.PER_HEAD if keys.get("use_qk_norm") else QKNorm.NONE,
        qkv_bias=keys.get("attention_bias", False),
    )
    layers = _read_first_dense_layers(keys, _read_v3_moe(keys), default=1)
    return read_decoder(keys, repeat(attention, keys), layers)


def _write_glm4_moe(config: DecoderConfig) -> dict[str, Any]:
    attention = find_attention(config)
    share = attention.rope.dim / attention.head_dim
    return {
        **write_decoder(config),
        **write_attention(config),
        **write_rope(attention.rope, config.max_positions, partial_rotary_factor=share),
        **_write_moe(config),
        "partial_rotary_factor": share,
        "use_qk_norm": attention.qk_norm is QKNorm.PER_HEAD,
        "attention_bias": attention.qkv_bias,
        "num_nextn_predict_layers": 0,
    }


_LAYOUT = Layout(
    (
        MoELayout("mlp", SeparateExperts(), shared="shared_experts", router_dtype=torch.float32),
        MoELayout("mlp", StackedExperts(), shared="shared_experts", router_dtype=torch.float32),
    ),
    may_predict_further=True,
)

DEEPSEEK_V2 = Family(
    ("deepseek_v2",),
    "DeepseekV2ForCausalLM",
    _LAYOUT,
    _read_v2,
    _write_v2,
    "latent attention; softmax routing within the best groups; shared experts; the first layers dense",
)
DEEPSEEK_V3 = Family(
    ("deepseek_v3", "kimi_k2"),
    "DeepseekV3ForCausalLM",
    _LAYOUT,
    _read_v3,
    _write_v3,
    "as deepseek_v2 with sigmoid scores and a selection bias (DeepSeek-V3, R1, Kimi-K2)",
)
GLM4_MOE = Family(
    ("glm4_moe",),
    "Glm4MoeForCausalLM",
    _LAYOUT,
    _read_glm4_moe,
    _write_glm4_moe,
    "DeepSeek-V3's routing and shared experts with grouped-query attention; rotates half of each head",
)
