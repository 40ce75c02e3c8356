"""Small checkpoints of quantised families for tests: random weights, odd sizes, and what they stand for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesys.checkpoint import save_model
from moesys.models import FAMILIES, Decoder, initialize_weights

WEIGHTS = "model.safetensors"
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 19,
    "hidden_size": 20,
    "intermediate_size": 24,
    "moe_intermediate_size": 11,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 9,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 19,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def make_checkpoint(folder: Path, keys: dict[str, Any]) -> dict[str, Tensor]:
    """Writes a model with random weights and returns its tensors."""
    family = next(family for family in FAMILIES if keys["model_type"] in family.model_types)
    model = Decoder(family.read_config(keys))
    initialize_weights(model, seed=0, std=0.5)
    save_model(model, folder, torch.float32, {}, family=family)
    return load_file(folder / WEIGHTS)


def write_quantised(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def quantise_fp8(
    weight: Tensor, block: tuple[int, int], encode: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns values, encoded factors and what the two stand for; a loop over blocks."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    factors = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    meant = torch.empty(rows, columns)
    for i, j in itertools.product(range(factors.shape[0]), range(factors.shape[1])):
        place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
        factors[i, j] = 2.0 ** torch.ceil(torch.log2(weight[place].abs().max() / 448))
        values[place] = (weight[place] / factors[i, j]).to(torch.float8_e4m3fn)
        meant[place] = values[place].float() * factors[i, j]
    return values, encode(factors), meant


def make_fp8(folder: Path) -> None:
    """Writes `DEEPSEEK` with its projections in FP8 blocks."""
    tensors = make_checkpoint(folder, DEEPSEEK)
    for name in [name for name in tensors if "proj" in name and tensors[name].ndim == 2]:
        tensors[name], tensors[f"{name}_scale_inv"], _ = quantise_fp8(tensors[name], (4, 8), torch.clone)
    write_quantised(folder, tensors, {"quant_method": "fp8", "weight_block_size": [4, 8]})


def make_mxfp4(folder: Path) -> None:
    """Writes `GPT_OSS` with random experts in MXFP4."""
    tensors = make_checkpoint(folder, GPT_OSS)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*groups, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(100, 140, groups, generator=generator, dtype=torch.uint8)
    write_quantised(folder, tensors, {"quant_method": "mxfp4"})
