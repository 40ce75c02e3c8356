"""The rotary position embedding (Su et al., arXiv 2104.09864) in the half-split form of Llama checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moesys.kernels import rotate_pairs


class Rotation(NamedTuple):
    """Cosines and sines of each position, (batch, sequence, 1, head_dim / 2) float32."""

    cos: Tensor
    sin: Tensor


def compute_rotation(positions_BS: Tensor, head_dim: int, theta: float) -> Rotation:
    """Computes the angles position * theta^(-2i / head_dim) in float32, once per forward pass for all layers."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    angles = positions_BS[..., None].float() * (1.0 / theta**exponents)
    return Rotation(angles.cos().unsqueeze(2), angles.sin().unsqueeze(2))


def apply_rotation(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates (batch, sequence, heads, head_dim), pairing element i with i + head_dim / 2. Keeps the dtype."""
    return rotate_pairs(x, rotation.cos, rotation.sin)
