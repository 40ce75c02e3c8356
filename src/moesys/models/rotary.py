"""Turning queries and keys by their positions. The angles come from `rope`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels import rotate_pairs
from moesys.models.rope import RopeConfig, compute_frequencies


class Rotation(NamedTuple):
    """Cosines and sines of each position, (batch, sequence, 1, dim / 2) float32."""

    cos: Tensor
    sin: Tensor


def compute_rotation(positions_BS: Tensor, rope: RopeConfig) -> Rotation:
    """Computes position * frequency in float32, once per forward pass for all layers of the same rope.

    Raises `ShapeError` for a position at which the rope's angles are not defined; only a rope that ends somewhere looks
    at the positions, which waits for the device.
    """
    limit = rope.max_positions
    if limit is not None and positions_BS.numel() and (last := int(positions_BS.max())) >= limit:
        raise ShapeError(
            f"position {last} lies beyond the original context ({limit} tokens) that a longrope is run within; "
            "shorten the sequence"
        )
    frequencies, factor = compute_frequencies(rope, positions_BS.device)
    angles = positions_BS[..., None].float() * frequencies
    return Rotation((angles.cos() * factor).unsqueeze(2), (angles.sin() * factor).unsqueeze(2))


def apply_rotation(x: Tensor, rotation: Rotation, rope: RopeConfig) -> Tensor:
    """Turns the first ``rope.dim`` elements of (batch, sequence, heads, size) and keeps the others. Keeps the dtype.

    Interleaved pairs come out side by side in halves: queries and keys alike, so that their products are the same.
    """
    turned = x if x.shape[-1] == rope.dim else x[..., : rope.dim]
    if rope.is_interleaved:
        turned = turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    turned = rotate_pairs(turned, rotation.cos, rotation.sin)
    return turned if x.shape[-1] == rope.dim else torch.cat([turned, x[..., rope.dim :]], dim=-1)
