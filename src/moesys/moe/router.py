"""The router: from token activations to a `Routing`. Always in float32, whatever the model's arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.errors import ShapeError
from moesys.moe.routing import Routing


class TopKRouter(nn.Module):
    """Softmax over all experts, then the k largest probabilities (Shazeer et al., arXiv 1701.06538, without noise).

    With ``normalize`` the k weights of a token are scaled to sum to one, as in Mixtral and Qwen3-MoE. Ties go to
    the lower expert id.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, normalize: bool = True) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ShapeError(
                f"top_k ({top_k}) must be between 1 and num_experts ({num_experts}); lower top_k or add experts"
            )
        self.weight_ED = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.top_k = top_k
        self.normalize = normalize

    def forward(self, x_TD: Tensor, replayed_expert_ids_TK: Tensor | None = None) -> Routing:
        """Routes (tokens, hidden) of any float dtype; given expert ids are used instead of choosing."""
        num_experts = self.weight_ED.shape[0]
        dtype = torch.promote_types(self.weight_ED.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = nn.functional.linear(x_TD.to(dtype), self.weight_ED.to(dtype))
        scores_TE = logits_TE.softmax(dim=-1)
        expert_ids_TK = replayed_expert_ids_TK
        if expert_ids_TK is None:
            expert_ids_TK = choose_top_k(scores_TE.detach(), self.top_k)
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        num_tokens, k = expert_ids_TK.shape
        return Routing(
            expert_ids=expert_ids_TK.reshape(-1),
            weights=weights_TK.reshape(-1),
            token_offsets=torch.arange(0, num_tokens * k + 1, k, device=x_TD.device),
            num_experts=num_experts,
            fixed_k=k,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )


def choose_top_k(scores_TE: Tensor, top_k: int) -> Tensor:
    """Returns (tokens, k) int64: the experts with the largest scores, best first; ties go to the lower expert id."""
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
