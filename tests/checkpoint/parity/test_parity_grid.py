"""Law 4 for options together: a seeded sample of what each family's configs may combine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from oracle import assert_same, compute_logits, load_theirs, make_theirs, make_tokens

from family_keys import FAMILY_KEYS, VARIANT_KEYS, Keys
from moesys.checkpoint import load_model, save_model
from moesys.models import FAMILIES

SAMPLES = 15
TOKENS = make_tokens()
BIASES = {"attention_bias": [True, False]}
WINDOW = {"sliding_window": [None, 1, 7, 48]}
LAYER_WINDOWS = WINDOW | {"use_sliding_window": [True, False], "max_window_layers": [0, 1, 2, 9]}
NORMALIZED = {"norm_topk_prob": [True, False]}
GROUPS = {"n_group": [1, 2, 4], "topk_group": [1, 2], "routed_scaling_factor": [1.0, 2.5]}
DENSE_LAYERS = {"first_k_dense_replace": [0, 1, 2], "n_routed_experts": [8, 16]}
SPARSE_LAYERS = {"decoder_sparse_step": [1, 2], "mlp_only_layers": [[], [1]]}
LATENT = {"q_lora_rank": [None, 10], "v_head_dim": [6, 12, 16], "kv_lora_rank": [10, 20]}
ROPES = [
    VARIANT_KEYS[name]["rope_parameters"]
    for name in ("llama", "llama-linear", "llama-llama3-biases", "qwen3-late-windows-biases-yarn")
]

COMMON: dict[str, list[Any]] = {
    "num_hidden_layers": [1, 3],
    "hidden_size": [32, 48],
    "tie_word_embeddings": [True, False],
    "rms_norm_eps": [1e-6, 1e-2],
    "num_experts_per_tok": [1, 2, 4],
}
GROUPED = {"num_key_value_heads": [1, 2, 4], "head_dim": [8, 16], "rope_parameters": ROPES}
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "mixtral": GROUPED | WINDOW,
    "qwen2_moe": GROUPED | LAYER_WINDOWS | NORMALIZED | SPARSE_LAYERS | {"qkv_bias": [True, False]},
    "qwen3_moe": GROUPED | BIASES | LAYER_WINDOWS | NORMALIZED | SPARSE_LAYERS,
    "olmoe": {"num_key_value_heads": [1, 2, 4]} | BIASES | NORMALIZED | {"clip_qkv": [None, 0.7]},
    "deepseek_v2": BIASES
    | LATENT
    | GROUPS
    | DENSE_LAYERS
    | {"topk_method": ["greedy", "group_limited_greedy"], "n_shared_experts": [1, 2]},
    "deepseek_v3": BIASES | LATENT | GROUPS | DENSE_LAYERS | NORMALIZED | {"rope_interleave": [True, False]},
    "glm4_moe": {"num_key_value_heads": [1, 4], "head_dim": [8, 16], "use_qk_norm": [True, False]}
    | BIASES
    | GROUPS
    | DENSE_LAYERS
    | NORMALIZED,
    "gpt_oss": {"num_key_value_heads": [1, 4], "head_dim": [8, 16], "swiglu_limit": [0.5, 7.0]}
    | BIASES
    | {"sliding_window": [1, 7, 48]},
    "granitemoe": BIASES
    | {"num_key_value_heads": [1, 4], "embedding_multiplier": [1.0, 3.0], "logits_scaling": [1.0, 5.0]}
    | {"residual_multiplier": [1.0, 0.3], "attention_multiplier": [0.2, 0.05]},
    "phimoe": BIASES
    | WINDOW
    | {"num_experts_per_tok": [2], "num_key_value_heads": [1, 4], "lm_head_bias": [True, False]}
    | {"router_jitter_noise": [0.01, 0.3, 2.0]},
    "minimax_m2": {"num_key_value_heads": [1, 4], "head_dim": [16, 32]},
    "qwen3": GROUPED | BIASES | LAYER_WINDOWS,
    "llama": GROUPED | BIASES | {"mlp_bias": [True, False]},
    "mistral": GROUPED | WINDOW,
}


def draw_keys(model_type: str, seed: int) -> Keys:
    generator = random.Random(seed)
    options = COMMON | OPTIONS[model_type]
    drawn = {key: generator.choice(values) for key, values in options.items()}
    num_layers = drawn["num_hidden_layers"]
    if drawn.get("n_group") == 1:
        drawn["topk_group"] = 1
    if "first_k_dense_replace" in drawn:
        drawn["first_k_dense_replace"] = min(drawn["first_k_dense_replace"], num_layers - 1)
    if "decoder_sparse_step" in drawn and (num_layers == 1 or drawn["mlp_only_layers"]):
        drawn["decoder_sparse_step"] = 1  # at least one layer has experts
    if drawn.get("use_sliding_window"):
        drawn["sliding_window"] = drawn["sliding_window"] or 7
    if drawn.get("lm_head_bias"):
        drawn["tie_word_embeddings"] = False
    return FAMILY_KEYS[model_type] | drawn


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SAMPLES))
@pytest.mark.parametrize("model_type", OPTIONS)
@torch.no_grad()
def test_options_in_any_company(model_type: str, seed: int, tmp_path: Path) -> None:
    theirs = make_theirs(draw_keys(model_type, seed))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    logits = compute_logits(ours, TOKENS)
    assert_same(logits, theirs(TOKENS).logits)
    (tmp_path / "ours").mkdir()
    family = next(family for family in FAMILIES if family.model_type == model_type)
    save_model(ours, tmp_path / "ours", torch.float32, {}, family=family)
    assert_same(logits, load_theirs(tmp_path / "ours")(TOKENS).logits)


def test_every_family_is_sampled() -> None:
    assert OPTIONS.keys() == FAMILY_KEYS.keys()
