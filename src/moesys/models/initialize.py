"""Initial weights as a pure function of the seed and the parameter's name: no layout or world size changes them.

Each expert draws from its own seed, so that no two experts start equal and none depends on where it lies.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from moesys.models.decoder import Decoder
from moesys.models.roles import Role, classify_parameters

_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight", "down_EDF")


@torch.no_grad()
def initialize_weights(model: Decoder, seed: int, std: float = 0.02) -> None:
    """Draws normal weights with standard deviation ``std``; norms are one, biases zero.

    Projections back into the residual stream are scaled by 1 / sqrt(2 * layers) (GPT-2).
    """
    roles = classify_parameters(model)
    for name, parameter in model.named_parameters():
        scale = std / math.sqrt(2 * model.config.num_layers) if name.endswith(_INTO_RESIDUAL) else std
        match roles[name]:
            case Role.NORM:
                parameter.fill_(1.0)
            case Role.BIAS:
                parameter.zero_()
            case Role.EXPERT:
                for expert_id, weight in enumerate(parameter):
                    _draw(weight, f"{seed}/{name}/{expert_id}", scale)
            case _:
                _draw(parameter, f"{seed}/{name}", scale)


def _draw(weight: Tensor, key: str, std: float) -> None:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float32) * std)
