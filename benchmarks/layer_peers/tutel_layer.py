"""Tutel's MoE layer without dropping (capacity factor 0): its gate and its dispatch, experts as batched products."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tutel import moe as tutel_moe  # pyrefly: ignore[missing-import]

from layer_peers import BuiltLayer, get_dense_weights
from layer_peers.workload import LayerWeights


class SwiGLUExperts(nn.Module):
    """Tutel's custom experts: it calls the class with its own keywords, and forward with (rows, layer)."""

    def __init__(self, gate_up_EFD: Tensor, down_EDF: Tensor, **unused: object) -> None:
        super().__init__()
        self.gate_up_EFD = nn.Parameter(gate_up_EFD, requires_grad=False)
        self.down_EDF = nn.Parameter(down_EDF, requires_grad=False)

    def forward(self, x_ECD: Tensor, layer: nn.Module) -> Tensor:
        gate, up = torch.bmm(x_ECD, self.gate_up_EFD.transpose(1, 2)).chunk(2, dim=-1)
        return torch.bmm(nn.functional.silu(gate) * up, self.down_EDF.transpose(1, 2))


def build(variant: str, weights: LayerWeights, top_k: int) -> BuiltLayer:
    gate_up_EFD, down_EDF = get_dense_weights(weights)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layer = tutel_moe.moe_layer(
        gate_type={"type": "top", "k": top_k, "capacity_factor": 0},
        model_dim=down_EDF.shape[1],
        experts={
            "type": "custom",
            "module": SwiGLUExperts,
            "num_experts_per_device": down_EDF.shape[0],
            "gate_up_EFD": gate_up_EFD,
            "down_EDF": down_EDF,
        },
    ).eval()
    layer.gates[0].wg.weight = nn.Parameter(weights.router_ED.to(down_EDF.dtype), requires_grad=False)

    def compute(x_TD: Tensor) -> Tensor:
        return layer(x_TD)

    return BuiltLayer(compute, down_EDF.dtype)
