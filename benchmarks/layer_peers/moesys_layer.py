"""moesys: its router, its local dispatcher and its expert kernel, as the MoE layer strings them together.

The view is made by hand so that every weight format goes the same way. Activations are bfloat16 with bfloat16
weights, as in a model held in that type, and float32 otherwise. The variant is the name of a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layer_peers import BuiltLayer
from layer_peers.workload import LayerWeights
from moesys.kernels import BankView, Kernel, compute_experts_summed
from moesys.moe import LocalDispatcher, TopKRouter


def build(variant: str, weights: LayerWeights, top_k: int) -> BuiltLayer:
    num_experts, hidden_size = weights.router_ED.shape
    router = TopKRouter(hidden_size, num_experts, top_k)
    router.weight_ED = nn.Parameter(weights.router_ED, requires_grad=False)
    dispatcher, kernel = LocalDispatcher(), Kernel(variant)
    view = BankView(weights.gate_up_EFD, weights.down_EDF)

    def compute(x_TD: Tensor) -> Tensor:
        (part,) = dispatcher.dispatch(x_TD, router(x_TD))
        y_TD = compute_experts_summed(part.rows, view, part.weights_A, part.token_sum, kernel=kernel)
        return dispatcher.combine(y_TD, part.handle)

    is_bf16 = isinstance(weights.gate_up_EFD, Tensor) and weights.gate_up_EFD.dtype is torch.bfloat16
    return BuiltLayer(compute, torch.bfloat16 if is_bf16 else torch.float32)
