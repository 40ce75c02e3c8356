"""The dense feed-forward layer: shared experts and dense blocks are made of it."""

from __future__ import annotations

from torch import Tensor, nn

from moesys.moe.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), the dense feed-forward layer. Source: Shazeer, arXiv 2002.05202."""

    def __init__(self, hidden_size: int, inner_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * inner_size, bias=bias)
        self.down_proj = Linear(inner_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns (..., hidden)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)
