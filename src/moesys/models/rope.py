"""Rotary frequencies: which angle each pair of elements turns by per position, and how long contexts stretch it.

Pure numbers from plain records, in float32 as the checkpoints' own code computes them. `rotary` applies the angles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.errors import ShapeError


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a factor (Chen et al., arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies divided by a factor, fast ones kept, those between interpolated (Llama 3.1's release)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """Interpolation by wave length and a temperature (Peng et al., arXiv 2309.00071).

    beta_fast, beta_slow:  rotations over the original context above which a frequency is kept, and below which it is
                           divided by ``factor``.
    attention_factor:      multiplies cosines and sines; None for the paper's 0.1 ln(factor) + 1, or its ratio for
                           ``mscale`` and ``mscale_all_dim`` where both are given (DeepSeek).
    truncates:             whether the borders of the ramp are rounded to whole dimensions.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncates: bool = True

    def compute_attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return compute_mscale(self.factor, self.mscale) / compute_mscale(self.factor, self.mscale_all_dim)
        return compute_mscale(self.factor, 1.0)


@dataclass(frozen=True)
class LongRopeScaling:
    """A factor per frequency found by search (Ding et al., arXiv 2402.13753), here up to the original context.

    Beyond it the method turns all keys by other factors, also those that a cache already holds turned, so that decoding
    would depend on how the prompt was cut. Models of it are therefore run within ``original_positions``.

    short_factors:     one per pair of elements.
    long_factors:      those beyond the original context; kept for writing the checkpoint again.
    attention_factor:  multiplies cosines and sines; None for sqrt(1 + ln(factor) / ln(original_positions)).
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_positions: int
    factor: float
    short_attention_factor: float | None = None
    long_attention_factor: float | None = None

    def compute_attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.short_attention_factor is not None:
            return self.short_attention_factor
        if self.factor <= 1.0:
            return 1.0
        return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_positions))


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding (Su et al., arXiv 2104.09864) of the first ``dim`` elements of each head.

    is_interleaved:  whether a pair is (2i, 2i + 1), as in DeepSeek's checkpoints, instead of (i, i + dim / 2).
    """

    dim: int
    theta: float = 10000.0
    scaling: Scaling | None = None
    is_interleaved: bool = False

    def __post_init__(self) -> None:
        if self.dim % 2:
            raise ShapeError(f"the rotary dimensions ({self.dim}) must be even")
        if isinstance(self.scaling, LongRopeScaling):
            for factors in (self.scaling.short_factors, self.scaling.long_factors):
                if len(factors) != self.dim // 2:
                    raise ShapeError(
                        f"longrope needs one factor per pair of the {self.dim} rotary dimensions ({self.dim // 2}), "
                        f"got {len(factors)}"
                    )

    @property
    def scaled_positions(self) -> int | None:
        """Positions that YaRN stretches the original context to, which config files often leave as it was; None
        without YaRN."""
        if not isinstance(self.scaling, YarnScaling):
            return None
        return round(self.scaling.original_positions * self.scaling.factor)

    @property
    def max_positions(self) -> int | None:
        """Positions beyond which the angles are not defined here; None without such a limit."""
        return self.scaling.original_positions if isinstance(self.scaling, LongRopeScaling) else None


def compute_mscale(factor: float, scale: float) -> float:
    """YaRN's temperature, 0.1 * scale * ln(factor) + 1; one for factors up to one."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def compute_frequencies(rope: RopeConfig, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Returns (dim / 2,) float32 angles per position, and the factor of cosines and sines."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim
    base = 1.0 / rope.theta**exponents
    match rope.scaling:
        case None:
            return base, 1.0
        case LinearScaling(factor=factor):
            return base / factor, 1.0
        case Llama3Scaling() as scaling:
            return _stretch_llama3(base, scaling), 1.0
        case YarnScaling() as scaling:
            return _stretch_yarn(base, rope, scaling), scaling.compute_attention_factor()
        case LongRopeScaling() as scaling:
            factors = torch.tensor(scaling.short_factors, dtype=torch.float32, device=device)
            return 1.0 / (factors * rope.theta**exponents), scaling.compute_attention_factor()


def _stretch_llama3(base: Tensor, scaling: Llama3Scaling) -> Tensor:
    original, low, high = scaling.original_positions, scaling.low_freq_factor, scaling.high_freq_factor
    wave_length = 2 * math.pi / base
    share = (original / wave_length - low) / (high - low)
    between = (1 - share) * base / scaling.factor + share * base
    stretched = torch.where(wave_length > original / low, base / scaling.factor, between)
    return torch.where(wave_length < original / high, base, stretched)


def _stretch_yarn(base: Tensor, rope: RopeConfig, scaling: YarnScaling) -> Tensor:
    def find_dim(num_rotations: float) -> float:
        """The dimension that turns so often over the original context."""
        turns = scaling.original_positions / (num_rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = find_dim(scaling.beta_fast), find_dim(scaling.beta_slow)
    if scaling.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(rope.dim // 2, dtype=torch.float32, device=base.device)
    ramp = ((steps - low) / (high - low)).clamp(0, 1)
    return ramp * (base / scaling.factor) + (1 - ramp) * base
