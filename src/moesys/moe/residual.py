"""Residual MoE: a dense layer that every token passes beside its experts, the two mixed per token."""

from __future__ import annotations

from torch import Tensor, nn

from moesys.moe.linear import Linear
from moesys.moe.mlp import MLP
from moesys.moe.swiglu import SwiGLU


class ResidualBranch(nn.Module):
    """c_0 * experts(x) + c_1 * dense(x) with c = softmax(coefficient(x)).

    Gives about the quality of one more expert per token without moving another one.
    Source: DeepSpeed-MoE, arXiv 2201.05596, section 4.1, and its code for the coefficient.
    """

    def __init__(self, hidden_size: int, dense: SwiGLU | MLP) -> None:
        super().__init__()
        self.dense = dense
        self.coefficient = Linear(hidden_size, 2)

    def forward(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        """Mixes what the experts made of (tokens, hidden), ``y_TD``, with the dense layer's output; same shape."""
        coefficients_T2 = self.coefficient(x_TD).softmax(dim=-1)
        return y_TD * coefficients_T2[:, :1] + self.dense(x_TD) * coefficients_T2[:, 1:]
