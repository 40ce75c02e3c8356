"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are expanded from one narrow latent.

Keys and values are handed to `Attend` expanded, so that every mask and cache serves this mixer too. A cache of the
latents alone would be smaller by the number of heads; it needs no change here but another `Attend`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.models.attend import Attend, SoftmaxRule
from moesys.models.config import LatentAttentionConfig
from moesys.models.norm import RMSNorm
from moesys.models.rotary import Rotation, apply_rotation
from moesys.moe import Linear


class LatentAttention(nn.Module):
    """Causal self-attention over keys and values that share a latent.

    q_proj, or q_a_proj, q_a_norm and q_b_proj with ``query_rank``: queries, per head [nope | rope] rows.
    kv_a_proj:  the latent's rows, then those of the rope key that all heads share.
    kv_b_proj:  per head its nope key rows, then its value rows.
    """

    def __init__(self, hidden_size: int, config: LatentAttentionConfig, layer_id: int) -> None:
        super().__init__()
        self.config = c = config
        self.layer_id = layer_id
        query_width = c.num_heads * c.key_dim
        if c.query_rank is None:
            self.q_proj = Linear(hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = Linear(hidden_size, c.query_rank, bias=c.bias)
            self.q_a_norm = RMSNorm(c.query_rank, c.latent_epsilon)
            self.q_b_proj = Linear(c.query_rank, query_width, bias=False)
        self.kv_a_proj = Linear(hidden_size, c.latent_rank + c.rope.dim, bias=c.bias)
        self.kv_a_norm = RMSNorm(c.latent_rank, c.latent_epsilon)
        self.kv_b_proj = Linear(c.latent_rank, c.num_heads * (c.nope_head_dim + c.value_head_dim), bias=False)
        self.o_proj = Linear(c.num_heads * c.value_head_dim, hidden_size, bias=c.bias)

    def forward(self, x_BSD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """Takes and returns (batch, sequence, hidden)."""
        c = self.config
        q = self._project_queries(x_BSD).unflatten(-1, (c.num_heads, -1))
        latent, k_rope = self.kv_a_proj(x_BSD).split([c.latent_rank, c.rope.dim], dim=-1)
        kv = self.kv_b_proj(self.kv_a_norm(latent)).unflatten(-1, (c.num_heads, -1))
        k_nope, v = kv.split([c.nope_head_dim, c.value_head_dim], dim=-1)
        q_nope, q_rope = q.split([c.nope_head_dim, c.rope.dim], dim=-1)
        q_rope = apply_rotation(q_rope, rotation, c.rope)
        k_rope = apply_rotation(k_rope.unsqueeze(-2), rotation, c.rope)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:-1], -1)], dim=-1)
        y = attend(self.layer_id, q, k, v, SoftmaxRule(c.scale))
        return self.o_proj(y.flatten(-2))

    def _project_queries(self, x_BSD: Tensor) -> Tensor:
        if self.config.query_rank is None:
            return self.q_proj(x_BSD)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))
