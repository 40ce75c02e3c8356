"""Grouped-query attention. Projections, norms and rotary embedding; what is visible is the caller's `Attend`."""

from __future__ import annotations

from torch import Tensor, nn

from moesys.models.attend import Attend
from moesys.models.config import AttentionConfig
from moesys.models.norm import RMSNorm
from moesys.models.rotary import Rotation, apply_rotation
from moesys.moe import Linear


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al., arXiv 2305.13245).

    Query, key and value projections are one matrix: query rows, then key rows, then value rows.
    """

    def __init__(self, hidden_size: int, config: AttentionConfig, norm_epsilon: float, layer_id: int) -> None:
        super().__init__()
        self.config = config
        self.layer_id = layer_id
        num_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv_proj = Linear(hidden_size, num_rows, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, norm_epsilon) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """Takes and returns (batch, sequence, hidden)."""
        c = self.config
        batch, length, _ = x_BSD.shape
        qkv = self.qkv_proj(x_BSD).view(batch, length, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = qkv.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotation(q, rotation), apply_rotation(k, rotation)
        y = attend(self.layer_id, q, k, v, c.sliding_window)
        return self.o_proj(y.reshape(batch, length, c.num_heads * c.head_dim))
