"""transformers' Qwen3-MoE block, with each experts implementation that it has for CPUs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from layer_peers import BuiltLayer, UnavailableError, get_dense_weights
from layer_peers.workload import LayerWeights


def build(variant: str, weights: LayerWeights, top_k: int) -> BuiltLayer:
    gate_up_EFD, down_EDF = get_dense_weights(weights)
    num_experts, hidden_size, inner_size = down_EDF.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden_size,
        moe_intermediate_size=inner_size,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        experts_implementation=variant,  # pyrefly: ignore[unexpected-keyword]
    )
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config).eval()
    block.gate.weight = _freeze(weights.router_ED.to(down_EDF.dtype))
    block.experts.gate_up_proj = _freeze(gate_up_EFD)
    block.experts.down_proj = _freeze(down_EDF)
    expert_bytes = weights.expert_bytes

    def compute(x_TD: Tensor) -> Tensor:
        return block(x_TD.unsqueeze(0)).squeeze(0)

    def check_room(num_tokens: int) -> None:
        if variant == "batched_mm":
            _check_room_for_copies(num_tokens * top_k * expert_bytes)

    return BuiltLayer(compute, down_EDF.dtype, check_room)


def _freeze(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _check_room_for_copies(needed_bytes: int) -> None:
    """batched_mm copies an expert's weights for every assignment."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_bytes = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if needed_bytes > 0.5 * free_bytes:
        raise UnavailableError(
            f"it copies each token's expert weights: {needed_bytes / 2**30:.0f} GiB, "
            f"{free_bytes / 2**30:.0f} GiB are free"
        )
