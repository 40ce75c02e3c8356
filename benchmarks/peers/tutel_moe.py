"""A Tutel layer in the plain decoder: its gate and its dispatch, SwiGLU experts as batched products.

Capacity factor 1.25; what does not fit is dropped and counted.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tutel import moe as tutel_moe  # pyrefly: ignore[missing-import]

from peers import Arithmetic, Trainee
from peers.network import Decoder
from peers.step import PlainTrainee
from peers.workload import Shape

CAPACITY_FACTOR = 1.25


class SwiGLUExperts(nn.Module):
    """Tutel's custom experts: it calls the class with its own keywords, and forward with (rows, layer)."""

    def __init__(
        self, model_dim: int, num_experts_per_device: int, expert_size: int, **unused: object
    ) -> None:
        super().__init__()
        self.gate_up_EDF = nn.Parameter(torch.empty(num_experts_per_device, model_dim, 2 * expert_size))
        self.down_EFD = nn.Parameter(torch.empty(num_experts_per_device, expert_size, model_dim))

    def forward(self, x_ECD: Tensor, layer: nn.Module) -> Tensor:
        gate, up = torch.bmm(x_ECD, self.gate_up_EDF).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down_EFD)


class TutelLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.moe = tutel_moe.moe_layer(
            gate_type={"type": "top", "k": shape.top_k, "capacity_factor": CAPACITY_FACTOR},
            model_dim=shape.hidden_size,
            experts={
                "type": "custom",
                "module": SwiGLUExperts,
                "num_experts_per_device": shape.num_experts,
                "expert_size": shape.expert_size,
            },
        )

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        y_BSD = self.moe(x_BSD)
        return y_BSD, y_BSD.l_aux


class TutelTrainee(PlainTrainee):
    def __init__(self, shape: Shape, arithmetic: Arithmetic) -> None:
        self._layers: list[TutelLayer] = []
        self._shape = shape
        super().__init__(Decoder(shape, self._make_layer), arithmetic)

    def _make_layer(self) -> TutelLayer:
        layer = TutelLayer(self._shape)
        self._layers.append(layer)
        return layer

    def count_dropped(self) -> float | None:
        num_assignments = self._shape.num_tokens * self._shape.top_k
        tokens_per_expert = -(-self._shape.num_tokens // self._shape.num_experts)
        capacity = self._shape.top_k * int(CAPACITY_FACTOR * tokens_per_expert)
        dropped = sum(int((layer.moe.dispatch_count - capacity).clamp(min=0).sum()) for layer in self._layers)
        return dropped / (num_assignments * len(self._layers))


def build(variant: str, shape: Shape, arithmetic: Arithmetic) -> Trainee:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return TutelTrainee(shape, arithmetic)
