"""The MoE layer that a good programmer writes in plain torch: sort by expert, two products per expert with rows.

``as-held`` multiplies in the dtype of the weights; ``widened`` widens one bfloat16 expert after the other to
float32, which is faster where the CPU has no bfloat16 products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layer_peers import BuiltLayer, get_dense_weights
from layer_peers.routed_rows import route_rows
from layer_peers.workload import LayerWeights


def build(variant: str, weights: LayerWeights, top_k: int) -> BuiltLayer:
    gate_up_EFD, down_EDF = get_dense_weights(weights)
    dtype = torch.float32 if variant == "widened" else gate_up_EFD.dtype
    router_ED = weights.router_ED.to(dtype)

    def compute(x_TD: Tensor) -> Tensor:
        rows = route_rows(x_TD, router_ED, top_k)
        outputs = []
        for expert, x_ND in enumerate(rows.x_AD.split(rows.counts_E.tolist())):
            if x_ND.shape[0] == 0:
                continue
            gate_NF, up_NF = torch.mm(x_ND, gate_up_EFD[expert].to(dtype).t()).chunk(2, dim=-1)
            activation_NF = torch.nn.functional.silu(gate_NF).mul_(up_NF)
            outputs.append(torch.mm(activation_NF, down_EDF[expert].to(dtype).t()))
        return rows.sum_rows(torch.cat(outputs), x_TD.shape[0])

    return BuiltLayer(compute, dtype)
