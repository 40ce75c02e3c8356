"""Grouped-query attention. Projections, norms and rotary embedding; what is visible is the caller's `Attend`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesys.models.attend import Attend, SoftmaxRule
from moesys.models.config import AttentionConfig, QKNorm
from moesys.models.norm import RMSNorm
from moesys.models.rotary import Rotation, apply_rotation
from moesys.moe import Linear


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al., arXiv 2305.13245).

    Query, key and value projections are one matrix: query rows, then key rows, then value rows.

    widths:   rows of each of the three.
    sinks_H:  (heads,) the score that each head gives to nothing; None without ``has_sinks``.
    """

    def __init__(self, hidden_size: int, config: AttentionConfig, norm_epsilon: float, layer_id: int) -> None:
        super().__init__()
        self.config = config
        self.layer_id = layer_id
        self.widths = [config.num_heads * config.head_dim] + 2 * [config.num_kv_heads * config.head_dim]
        self.qkv_proj = Linear(hidden_size, sum(self.widths), bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, hidden_size, bias=config.output_bias)
        sizes = {
            QKNorm.PER_HEAD: (config.head_dim, config.head_dim),
            QKNorm.WHOLE: (self.widths[0], self.widths[1]),
        }.get(config.qk_norm)
        self.q_norm = RMSNorm(sizes[0], norm_epsilon) if sizes else None
        self.k_norm = RMSNorm(sizes[1], norm_epsilon) if sizes else None
        self.sinks_H = nn.Parameter(torch.zeros(config.num_heads)) if config.has_sinks else None

    def forward(self, x_BSD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """Takes and returns (batch, sequence, hidden)."""
        c = self.config
        q, k, v = self.qkv_proj(x_BSD).split(self.widths, dim=-1)
        if c.qk_norm is QKNorm.WHOLE:
            q, k = self._normalize(q, k)
        if c.qkv_clip is not None:
            q, k, v = (tensor.clamp(-c.qkv_clip, c.qkv_clip) for tensor in (q, k, v))
        q, k, v = (tensor.unflatten(-1, (-1, c.head_dim)) for tensor in (q, k, v))
        if c.qk_norm is QKNorm.PER_HEAD:
            q, k = self._normalize(q, k)
        q, k = apply_rotation(q, rotation, c.rope), apply_rotation(k, rotation, c.rope)
        y = attend(self.layer_id, q, k, v, SoftmaxRule(c.scale, c.sliding_window, self.sinks_H))
        return self.o_proj(y.flatten(-2))

    def _normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)
