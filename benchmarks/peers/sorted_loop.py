"""The MoE layer that a good programmer writes in plain torch: sort assignments by expert, loop over experts.

Stacked weights are taken apart once with ``unbind``: indexing them per expert would cost a zero-filled
gradient of the whole stack for every expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers import Arithmetic, Trainee
from peers.network import Decoder
from peers.step import PlainTrainee
from peers.workload import Shape


class SortedLoopLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_experts, self.top_k = shape.num_experts, shape.top_k
        self.router = nn.Linear(shape.hidden_size, shape.num_experts, bias=False)
        self.gate_up_EFD = nn.Parameter(
            torch.empty(shape.num_experts, 2 * shape.expert_size, shape.hidden_size)
        )
        self.down_EDF = nn.Parameter(torch.empty(shape.num_experts, shape.hidden_size, shape.expert_size))

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = x_BSD.flatten(0, 1)
        probabilities_TE = self.router(x_TD).float().softmax(dim=-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)

        experts = experts_TK.flatten()
        counts_E = experts.bincount(minlength=self.num_experts)
        order = experts.argsort(stable=True)
        token_ids = order // self.top_k
        groups = x_TD[token_ids].split(counts_E.tolist())
        outputs = []
        for rows, gate_up, down in zip(
            groups, self.gate_up_EFD.unbind(), self.down_EDF.unbind(), strict=True
        ):
            gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        weighted = torch.cat(outputs) * weights_TK.flatten()[order, None]
        y_TD = torch.zeros_like(x_TD).index_add(0, token_ids, weighted.to(x_TD.dtype))

        share_E = counts_E / experts.numel()
        balance_loss = self.num_experts * (share_E * probabilities_TE.mean(dim=0)).sum()
        return y_TD.view_as(x_BSD), balance_loss


def build(variant: str, shape: Shape, arithmetic: Arithmetic) -> Trainee:
    return PlainTrainee(Decoder(shape, lambda: SortedLoopLayer(shape)), arithmetic)
