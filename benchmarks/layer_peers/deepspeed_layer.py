"""DeepSpeed's MoE layer without dropping: every expert is padded to the fullest one, experts are modules in a loop.

One rank exchanges nothing, so no process group is made: DeepSpeed's would compile a shared-memory operator first.
"""

from __future__ import annotations

import os

os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor

from layer_peers import BuiltLayer, get_dense_weights
from layer_peers.workload import LayerWeights
from peers.network import SwiGLU


def build(variant: str, weights: LayerWeights, top_k: int) -> BuiltLayer:
    gate_up_EFD, down_EDF = get_dense_weights(weights)
    num_experts, hidden_size, inner_size = down_EDF.shape
    with torch.device("meta"):
        expert = SwiGLU(hidden_size, inner_size)
    layer = MoE(
        hidden_size,
        expert,
        num_experts=num_experts,
        ep_size=1,
        k=top_k,
        drop_tokens=False,
        # Sampling the second expert is its default, and would be another layer than everyone else's.
        top2_2nd_expert_sampling=False,
    ).eval()
    state = {"deepspeed_moe.gate.wg.weight": weights.router_ED}
    for expert_id, (gate_up_FD, down_DF) in enumerate(zip(gate_up_EFD, down_EDF, strict=True)):
        prefix = f"deepspeed_moe.experts.deepspeed_experts.{expert_id}"
        state |= {f"{prefix}.gate_up.weight": gate_up_FD, f"{prefix}.down.weight": down_DF}
    layer.load_state_dict(state, assign=True)
    layer.requires_grad_(False)

    def compute(x_TD: Tensor) -> Tensor:
        y_1TD, _, _ = layer(x_TD.unsqueeze(0))
        return y_1TD.squeeze(0)

    return BuiltLayer(compute, down_EDF.dtype)
