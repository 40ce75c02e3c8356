"""A dense network of the same active arithmetic: one SwiGLU as wide as all experts that a token would pass.

It has no router and no balance loss. No MoE step is expected to beat it: it is the goal.
"""

from __future__ import annotations

from torch import Tensor, nn

from peers import Arithmetic, Trainee
from peers.network import Decoder, SwiGLU
from peers.step import PlainTrainee
from peers.workload import Shape


class DenseLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.swiglu = SwiGLU(shape.hidden_size, shape.top_k * shape.expert_size)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        return self.swiglu(x_BSD), x_BSD.new_zeros(())


def build(variant: str, shape: Shape, arithmetic: Arithmetic) -> Trainee:
    return PlainTrainee(Decoder(shape, lambda: DenseLayer(shape)), arithmetic)
