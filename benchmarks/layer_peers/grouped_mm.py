"""The MoE layer as two calls of ``torch.nn.functional.grouped_mm`` on rows sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from layer_peers import BuiltLayer, get_dense_weights
from layer_peers.routed_rows import route_rows
from layer_peers.workload import LayerWeights


def build(variant: str, weights: LayerWeights, top_k: int) -> BuiltLayer:
    gate_up_EFD, down_EDF = get_dense_weights(weights)
    router_ED = weights.router_ED.to(gate_up_EFD.dtype)

    def compute(x_TD: Tensor) -> Tensor:
        rows = route_rows(x_TD, router_ED, top_k)
        ends_E = rows.counts_E.cumsum(0).to(torch.int32)
        gate_AF, up_AF = grouped_mm(rows.x_AD, gate_up_EFD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        y_AD = grouped_mm(silu(gate_AF) * up_AF, down_EDF.transpose(1, 2), offs=ends_E)
        return rows.sum_rows(y_AD, x_TD.shape[0])

    return BuiltLayer(compute, gate_up_EFD.dtype)
