"""The sizes of published models: their keys, as their files have them, give the parameters that they are known for.

Layers that predict further tokens are not counted.
"""

from __future__ import annotations

from typing import Any

import pytest

from moesys.models import FAMILIES, DecoderConfig, make_skeleton

Keys = dict[str, Any]


def make_keys(
    model_type: str, vocab: int, hidden: int, layers: int, heads: int, inner: int, **others: Any
) -> Keys:
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        **others,
    }


LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
V3 = LATENT | {
    "q_lora_rank": 1536,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
}

PUBLISHED: dict[str, tuple[float, Keys]] = {
    "Mixtral-8x7B": (
        46.703,
        make_keys(
            "mixtral", 32000, 4096, 32, 32, 14336,
            num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        ),
    ),
    "Qwen3-30B-A3B": (
        30.532,
        make_keys(
            "qwen3_moe", 151936, 2048, 48, 32, 6144,
            num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=768, norm_topk_prob=True,
        ),
    ),
    "Qwen2-57B-A14B": (
        57.409,
        make_keys(
            "qwen2_moe", 151936, 3584, 28, 28, 18944,
            num_key_value_heads=4, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=2560,
            shared_expert_intermediate_size=20480,
        ),
    ),
    "OLMoE-1B-7B": (
        6.919,
        make_keys(
            "olmoe", 50304, 2048, 16, 16, 1024, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8
        ),
    ),
    "DeepSeek-V2-Lite": (
        15.706,
        make_keys(
            "deepseek_v2", 102400, 2048, 27, 16, 10944,
            **LATENT, q_lora_rank=None, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
            num_experts_per_tok=6, first_k_dense_replace=1, topk_method="greedy",
        ),
    ),
    "DeepSeek-V3": (
        671.026,
        make_keys(
            "deepseek_v3", 129280, 7168, 61, 128, 18432,
            **V3, n_routed_experts=256, first_k_dense_replace=3, n_group=8, topk_group=4,
        ),
    ),
    "Kimi-K2": (
        1026.0,
        make_keys(
            "kimi_k2", 163840, 7168, 61, 64, 18432,
            **V3, n_routed_experts=384, first_k_dense_replace=1, n_group=1, topk_group=1,
        ),
    ),
    "GLM-4.5-Air": (
        106.852,
        make_keys(
            "glm4_moe", 151552, 4096, 46, 96, 10944,
            num_key_value_heads=8, head_dim=128, moe_intermediate_size=1408, n_routed_experts=128,
            n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=1, attention_bias=True,
        ),
    ),
    "gpt-oss-20b": (
        20.915,
        make_keys(
            "gpt_oss", 201088, 2880, 24, 64, 2880,
            num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
        ),
    ),
    "gpt-oss-120b": (
        116.829,
        make_keys(
            "gpt_oss", 201088, 2880, 36, 64, 2880,
            num_key_value_heads=8, head_dim=64, num_local_experts=128, num_experts_per_tok=4,
        ),
    ),
    "granite-3.0-1b-a400m": (
        1.335,
        make_keys(
            "granitemoe", 49155, 1024, 24, 16, 512,
            num_key_value_heads=8, num_local_experts=32, num_experts_per_tok=8, tie_word_embeddings=True,
        ),
    ),
    "Phi-3.5-MoE": (
        41.873,
        make_keys(
            "phimoe", 32064, 4096, 32, 32, 6400,
            num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=2, attention_bias=True,
            lm_head_bias=True,
        ),
    ),
    "MiniMax-M2": (
        228.7,
        make_keys(
            "minimax_m2", 200064, 3072, 62, 48, 1536,
            num_key_value_heads=8, head_dim=128, rotary_dim=64, num_local_experts=256, num_experts_per_tok=8,
        ),
    ),
    "Qwen3-8B": (
        8.191,
        make_keys("qwen3", 151936, 4096, 36, 32, 12288, num_key_value_heads=8, head_dim=128),
    ),
    "Llama-3.1-8B": (8.030, make_keys("llama", 128256, 4096, 32, 32, 14336, num_key_value_heads=8)),
    "Mistral-7B": (7.242, make_keys("mistral", 32000, 4096, 32, 32, 14336, num_key_value_heads=8)),
}  # fmt: skip
"""Billions of parameters, and keys."""


def read(keys: Keys) -> DecoderConfig:
    family = next(family for family in FAMILIES if keys["model_type"] in family.model_types)
    return family.read(keys)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_size_that_it_is_known_for(name: str) -> None:
    billions, keys = PUBLISHED[name]
    model = make_skeleton(read(keys))
    assert model.count_parameters() / 1e9 == pytest.approx(billions, rel=4e-4)


@pytest.mark.parametrize(
    ("name", "num_elements"),
    [("DeepSeek-V3", 61 * 576), ("OLMoE-1B-7B", 16 * 2 * 2048), ("gpt-oss-20b", 24 * 2 * 512)],
)
def test_what_a_published_model_caches_of_a_token(name: str, num_elements: int) -> None:
    """DeepSeek-V3's 70 KB in bfloat16; keys and values of all its heads would be 5 MB."""
    mixers = read(PUBLISHED[name][1]).mixers
    assert sum(cached.num_elements for mixer in mixers for cached in mixer.cached) == num_elements


def test_every_family_has_a_published_model_here() -> None:
    types = {keys["model_type"] for _, keys in PUBLISHED.values()}
    assert all(types & set(family.model_types) for family in FAMILIES)
