"""A plain decoder around any feed-forward layer, for peers that are a layer and not a network.

RMSNorm, rotary embedding, per-head norm of queries and keys, scaled-dot-product attention with an explicit
mask, tied embeddings: the same network as Qwen3-MoE's. A feed-forward layer maps x [B, S, D] to (y, balance
loss). It knows nothing of experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.workload import Shape

INIT_STD = 0.02
NORM_EPSILON = 1e-6
ROPE_BASE = 10000.0


class Decoder(nn.Module):
    """``make_ffn`` is called once per layer."""

    def __init__(self, shape: Shape, make_ffn: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape, make_ffn()) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, NORM_EPSILON)
        cos_SH, sin_SH = compute_rotary_table(shape.sequence_length, shape.head_size)
        self.register_buffer("cos_SH", cos_SH)
        self.register_buffer("sin_SH", sin_SH)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, tokens_BS: Tensor, mask_B1SS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S, V] and the balance loss averaged over layers."""
        x_BSD = self.embedding(tokens_BS)
        balance_losses = []
        for block in self.blocks:
            x_BSD, balance_loss = block(x_BSD, mask_B1SS, self.cos_SH, self.sin_SH)
            balance_losses.append(balance_loss)
        logits_BSV = F.linear(self.norm(x_BSD), self.embedding.weight)
        return logits_BSV, torch.stack(balance_losses).mean()


class Block(nn.Module):
    def __init__(self, shape: Shape, ffn: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden_size, NORM_EPSILON)
        self.attention = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.hidden_size, NORM_EPSILON)
        self.ffn = ffn

    def forward(
        self, x_BSD: Tensor, mask_B1SS: Tensor, cos_SH: Tensor, sin_SH: Tensor
    ) -> tuple[Tensor, Tensor]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), mask_B1SS, cos_SH, sin_SH)
        y_BSD, balance_loss = self.ffn(self.ffn_norm(x_BSD))
        return x_BSD + y_BSD, balance_loss


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size, bias=False)
        self.out = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_size, NORM_EPSILON)
        self.k_norm = nn.RMSNorm(shape.head_size, NORM_EPSILON)

    def forward(self, x_BSD: Tensor, mask_B1SS: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BSD).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = (
            rotate(norm(t).transpose(1, 2), cos_SH, sin_SH)
            for norm, t in ((self.q_norm, q), (self.k_norm, k))
        )
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask_B1SS)
        return self.out(y.transpose(1, 2).flatten(2))


def compute_rotary_table(sequence_length: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, H] of the rotary embedding, halves repeated."""
    frequencies = ROPE_BASE ** -(torch.arange(0, head_size, 2) / head_size)
    angles = torch.outer(torch.arange(sequence_length), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x_BNSH: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    first, second = x_BNSH.chunk(2, dim=-1)
    return x_BNSH * cos_SH.to(x_BNSH.dtype) + torch.cat((-second, first), dim=-1) * sin_SH.to(x_BNSH.dtype)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
