"""Normalisation of activations: by the root mean square, or by mean and variance."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from moesys.kernels import rms_norm


class NormKind(StrEnum):
    """What a block's norms compute."""

    RMS = "rms"
    """Root mean square (Zhang and Sennrich, arXiv 1910.07467)."""
    LAYER = "layer"
    """Mean and variance, with a bias (Ba et al., arXiv 1607.06450)."""


@dataclass(frozen=True)
class NormConfig:
    """The norms around a decoder's mixers and feed-forward layers."""

    epsilon: float = 1e-6
    kind: NormKind = NormKind.RMS

    def make(self, size: int) -> RMSNorm | nn.LayerNorm:
        """Makes one norm over the last dimension of this size."""
        if self.kind is NormKind.LAYER:
            return nn.LayerNorm(size, self.epsilon)
        return RMSNorm(size, self.epsilon)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; the mean square is taken in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns (..., size) in the dtype of ``x``."""
        return rms_norm(x, self.weight, self.epsilon)
