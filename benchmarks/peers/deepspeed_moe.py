"""DeepSpeed's MoE layer in the plain decoder, one process, no ZeRO: the optimizer is torch's, as for all.

``capacity`` is its way of training (factor 1.25, what does not fit is dropped and counted); ``dropless`` pads
every expert to the fullest one. Experts are modules that it loops over. One rank exchanges nothing, so no
process group is made: DeepSpeed's would compile a shared-memory operator first.
"""

from __future__ import annotations

import os
from typing import cast

os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from peers import Arithmetic, Trainee
from peers.network import Decoder, SwiGLU
from peers.step import PlainTrainee
from peers.workload import Shape

CAPACITY_FACTOR = 1.25
MIN_CAPACITY = 4


class DeepSpeedLayer(nn.Module):
    def __init__(self, shape: Shape, drop_tokens: bool) -> None:
        super().__init__()
        self.moe = MoE(
            shape.hidden_size,
            SwiGLU(shape.hidden_size, shape.expert_size),
            num_experts=shape.num_experts,
            ep_size=1,
            k=shape.top_k,
            capacity_factor=CAPACITY_FACTOR,
            min_capacity=MIN_CAPACITY,
            drop_tokens=drop_tokens,
            # Sampling the second expert is its default, and would be another network than everyone else's.
            top2_2nd_expert_sampling=False,
        )
        self.counts_E: Tensor | None = None

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        y_BSD, balance_loss, self.counts_E = self.moe(x_BSD)
        return y_BSD, balance_loss


class DeepSpeedTrainee(PlainTrainee):
    def __init__(self, shape: Shape, drop_tokens: bool, arithmetic: Arithmetic) -> None:
        self._layers: list[DeepSpeedLayer] = []
        self._shape, self._drops = shape, drop_tokens
        super().__init__(Decoder(shape, self._make_layer), arithmetic)

    def _make_layer(self) -> DeepSpeedLayer:
        layer = DeepSpeedLayer(self._shape, self._drops)
        self._layers.append(layer)
        return layer

    def count_dropped(self) -> float | None:
        """From the wanted counts per expert, taken before capacity cuts them."""
        if not self._drops:
            return None
        num_assignments = self._shape.num_tokens * self._shape.top_k
        per_expert = -(-num_assignments * CAPACITY_FACTOR // self._shape.num_experts)
        capacity = max(int(per_expert), MIN_CAPACITY)
        dropped = sum(
            int((cast(Tensor, layer.counts_E) - capacity).clamp(min=0).sum()) for layer in self._layers
        )
        return dropped / (num_assignments * len(self._layers))


def build(variant: str, shape: Shape, arithmetic: Arithmetic) -> Trainee:
    return DeepSpeedTrainee(shape, variant == "capacity", arithmetic)
