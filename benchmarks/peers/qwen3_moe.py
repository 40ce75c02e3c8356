"""transformers' Qwen3-MoE, with each experts implementation that it has for CPUs.

The packed mask goes in as 4-D boolean, which its mask builder leaves alone. The head and the balance loss are
called here because ``Qwen3MoeForCausalLM.forward`` would take that mask for a padding mask in the latter.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from peers import Arithmetic, Trainee, UnavailableError
from peers.network import INIT_STD, NORM_EPSILON, ROPE_BASE
from peers.step import BALANCE_COEFFICIENT, PlainTrainee
from peers.workload import Shape


class Qwen3MoeNetwork(nn.Module):
    def __init__(self, shape: Shape, experts_implementation: str) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_heads,
            max_position_embeddings=shape.sequence_length,
            initializer_range=INIT_STD,
            rms_norm_eps=NORM_EPSILON,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
            tie_word_embeddings=True,
            moe_intermediate_size=shape.expert_size,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
            output_router_logits=True,
            router_aux_loss_coef=BALANCE_COEFFICIENT,
            use_cache=False,
        )
        self.model = Qwen3MoeForCausalLM._from_config(
            config, attn_implementation="sdpa", experts_implementation=experts_implementation
        )
        self.num_experts, self.top_k = shape.num_experts, shape.top_k

    def forward(self, tokens_BS: Tensor, mask_B1SS: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model.model(input_ids=tokens_BS, attention_mask=mask_B1SS, output_router_logits=True)
        logits_BSV = self.model.lm_head(outputs.last_hidden_state)
        balance_loss = load_balancing_loss_func(outputs.router_logits, self.num_experts, self.top_k)
        return logits_BSV, cast(Tensor, balance_loss)


def build(variant: str, shape: Shape, arithmetic: Arithmetic) -> Trainee:
    if variant == "batched_mm":
        _check_room_for_copies(shape)
    return PlainTrainee(Qwen3MoeNetwork(shape, variant), arithmetic)


def _check_room_for_copies(shape: Shape) -> None:
    """batched_mm copies an expert's weights for every assignment and keeps them for the backward pass."""
    weights_per_assignment = 3 * shape.hidden_size * shape.expert_size
    needed_bytes = shape.num_layers * shape.num_tokens * shape.top_k * weights_per_assignment * 4
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_bytes = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if needed_bytes > 0.8 * free_bytes:
        raise UnavailableError(
            f"it copies each token's expert weights: {needed_bytes / 2**30:.0f} GiB for one step, "
            f"{free_bytes / 2**30:.0f} GiB are free"
        )
