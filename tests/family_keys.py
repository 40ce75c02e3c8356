"""Keys of ``config.json`` for every family, and variants that exercise each of its options, small enough to run."""

from __future__ import annotations

from typing import Any

Keys = dict[str, Any]

_BASE: Keys = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_YARN: Keys = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_LLAMA3: Keys = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONGROPE: Keys = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.5, 1.25, 1.0, 2.0],
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 64,
}
_LOCAL: Keys = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24}
_QWEN_MOE: Keys = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
}
_DEEPSEEK: Keys = {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}

_FAMILIES: dict[str, Keys] = {
    "mixtral": _LOCAL | {"head_dim": 8},
    "qwen2_moe": _QWEN_MOE | {"shared_expert_intermediate_size": 20},
    "qwen3_moe": _QWEN_MOE | {"head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24},
    "deepseek_v2": _DEEPSEEK | {"q_lora_rank": None, "n_shared_experts": 2},
    "deepseek_v3": _DEEPSEEK | {"q_lora_rank": 12, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
    "glm4_moe": {
        "head_dim": 16,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "gpt_oss": _LOCAL
    | {
        "head_dim": 8,
        "sliding_window": 8,
        "swiglu_limit": 0.7,
        "rope_parameters": _YARN | {"rope_theta": 150000.0, "truncate": False},
    },
    "granitemoe": _LOCAL
    | {
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "tie_word_embeddings": True,
    },
    "phimoe": _LOCAL | {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.3},
    "minimax_m2": _LOCAL
    | {
        "head_dim": 16,
        "rotary_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "qwen3": {"head_dim": 16, "intermediate_size": 24},
    "llama": {"intermediate_size": 24},
    "mistral": {"intermediate_size": 24, "sliding_window": 8},
}

_VARIANTS: dict[str, tuple[str, Keys]] = {
    "mixtral-heads-from-the-width-tied": (
        "mixtral",
        {"head_dim": None, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "mixtral-window-one-kv-head": ("mixtral", {"sliding_window": 8, "num_key_value_heads": 1}),
    "qwen2_moe-windows-and-dense-layers": (
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 3,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe-window-biases-dense-layer": (
        "qwen3_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "attention_bias": True,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe-every-other-layer-tied": (
        "qwen3_moe",
        {"num_hidden_layers": 3, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    ),
    "qwen3_moe-one-expert-yarn": (
        "qwen3_moe",
        {"num_experts_per_tok": 1, "norm_topk_prob": False, "rope_parameters": _YARN},
    ),
    "olmoe-clip": ("olmoe", {"clip_qkv": 0.8, "attention_bias": True, "norm_topk_prob": True}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "q_lora_rank": 12,
            "norm_topk_prob": True,
            "routed_scaling_factor": 4.0,
            "attention_bias": True,
            "rms_norm_eps": 1e-2,
        },
    ),
    "deepseek_v2-two-mscales": (
        "deepseek_v2",
        {"rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}, "rms_norm_eps": 1e-2},
    ),
    "deepseek_v3-half-split": (
        "deepseek_v3",
        {
            "rope_interleave": False,
            "q_lora_rank": None,
            "attention_bias": True,
            "norm_topk_prob": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "deepseek_v3-no-groups": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "glm4_moe-groups-yarn": (
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": False,
            "attention_bias": False,
            "rope_parameters": _YARN | {"partial_rotary_factor": 0.5},
        },
    ),
    "gpt_oss-no-biases-all-sliding": (
        "gpt_oss",
        {"attention_bias": False, "layer_types": ["sliding_attention"] * 2, "tie_word_embeddings": True},
    ),
    "granitemoe-biases-untied": ("granitemoe", {"attention_bias": True, "tie_word_embeddings": False}),
    "phimoe-window-no-biases": (
        "phimoe",
        {
            "sliding_window": 8,
            "attention_bias": False,
            "lm_head_bias": False,
            "router_jitter_noise": 0.05,
        },
    ),
    "phimoe-longrope": (
        "phimoe",
        {"rope_parameters": _LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}},
    ),
    "minimax_m2-whole-head-tied": (
        "minimax_m2",
        {
            "rotary_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 1.0},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-late-windows-biases-yarn": (
        "qwen3",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "attention_bias": True,
            "rope_parameters": _YARN,
            "tie_word_embeddings": True,
        },
    ),
    "llama-llama3-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-longrope": ("llama", {"rope_parameters": _LONGROPE}),
    "llama-longrope-attention-factor": ("llama", {"rope_parameters": _LONGROPE | {"attention_factor": 1.7}}),
    "llama-yarn-attention-factor": ("llama", {"rope_parameters": _YARN | {"attention_factor": 1.7}}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
}

FAMILY_KEYS: dict[str, Keys] = {
    name: {"model_type": name, **_BASE, **keys} for name, keys in _FAMILIES.items()
}
"""One plain model per family."""

VARIANT_KEYS: dict[str, Keys] = {
    **FAMILY_KEYS,
    **{name: FAMILY_KEYS[family] | keys for name, (family, keys) in _VARIANTS.items()},
}
"""All families and their variants."""
