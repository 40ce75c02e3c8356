"""Grouped-query attention: its record and its module.

Projections, norms and rotary embedding; what is visible is the caller's `Attend`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from moesys.errors import ShapeError
from moesys.kernels.rms_norm import rms_norm_pair
from moesys.models.attend import Attend
from moesys.models.mixer import CachedTensor, Mixer
from moesys.models.norm import NormConfig, RMSNorm
from moesys.models.role import Role
from moesys.models.rope import RopeConfig
from moesys.models.rotary import Rotation, apply_rotation
from moesys.models.softmax_attention import SoftmaxRule, count_score_elements
from moesys.models.visible_keys import compute_mean_visible_keys
from moesys.moe import Linear


class QKNorm(StrEnum):
    """What queries and keys are RMS-normalised over before the rotary embedding."""

    NONE = "none"
    PER_HEAD = "per_head"
    """Each head by itself, one weight for all of them (Qwen3)."""
    WHOLE = "whole"
    """The whole projection (OLMoE)."""


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention with rotary embedding (Ainslie et al., arXiv 2305.13245)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    qk_norm: QKNorm = QKNorm.NONE
    qkv_bias: bool = False
    output_bias: bool = False
    sliding_window: int | None = None
    """Tokens that a token sees, itself included; None for all earlier ones."""
    softmax_scale: float | None = None
    """Factor of the scores; None for 1 / sqrt(head_dim)."""
    has_sinks: bool = False
    """Whether each head has a learned score that takes part in the softmax and has no value (gpt-oss)."""
    qkv_clip: float | None = None
    """Largest magnitude of queries, keys and values (OLMoE's ``clip_qkv``); None for no limit."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ShapeError(
                f"num_heads ({self.num_heads}) must be divisible by num_kv_heads ({self.num_kv_heads})"
            )
        if self.rope.dim > self.head_dim:
            raise ShapeError(
                f"the rotary dimensions ({self.rope.dim}) must not exceed head_dim ({self.head_dim})"
            )

    @property
    def kind(self) -> str:
        """See `MixerConfig`."""
        return "grouped-query attention"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def key_dim(self) -> int:
        """Elements of a key; of a value, `value_dim`."""
        return self.head_dim

    @property
    def value_dim(self) -> int:
        return self.head_dim

    @property
    def cached(self) -> tuple[CachedTensor, ...]:
        """See `MixerConfig`: keys and values."""
        return (CachedTensor(self.num_kv_heads, self.head_dim),) * 2

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """See `MixerConfig`."""
        return ()

    def make(self, hidden_size: int, norm: NormConfig, layer_id: int) -> Attention:
        """See `MixerConfig`."""
        return Attention(hidden_size, self, norm.epsilon, layer_id)

    def count_weights(self, hidden_size: int) -> int:
        """See `MixerConfig`."""
        return hidden_size * (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def count_products(self, context: int) -> float:
        """See `MixerConfig`: scores and values, of the keys that the causal mask and the window leave."""
        return 2 * self.num_heads * self.head_dim * compute_mean_visible_keys(self.sliding_window, context)

    def count_cached_products(self, context: int) -> float:
        """See `MixerConfig`: the same."""
        return self.count_products(context)

    def count_step_elements(self, num_tokens: int, num_positions: int) -> int:
        """See `MixerConfig`: queries, keys and values as projected, normalised and turned, the output, scores, and what
        a sink needs, a copy of the queries and of all visible keys and values."""
        new = num_tokens * self.head_dim * (5 * self.num_heads + 4 * self.num_kv_heads)
        visible = 2 * num_positions * self.head_dim * self.num_kv_heads
        return new + visible + count_score_elements(self.num_heads, num_tokens, num_positions)


class Attention(Mixer):
    """Causal self-attention with grouped key/value heads (Ainslie et al., arXiv 2305.13245).

    Query, key and value projections are one matrix: query rows, then key rows, then value rows.

    widths:   rows of each of the three.
    sinks_H:  (heads,) the score that each head gives to nothing; None without ``has_sinks``.
    """

    roles: ClassVar[Mapping[str, Role]] = MappingProxyType({"sinks_H": Role.BIAS})

    def __init__(self, hidden_size: int, config: AttentionConfig, norm_epsilon: float, layer_id: int) -> None:
        super().__init__()
        self.config = config
        self.layer_id = layer_id
        self.widths = [config.num_heads * config.head_dim] + 2 * [config.num_kv_heads * config.head_dim]
        self.qkv_proj = Linear(hidden_size, sum(self.widths), bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, hidden_size, bias=config.output_bias)
        sizes = {
            QKNorm.PER_HEAD: (config.head_dim, config.head_dim),
            QKNorm.WHOLE: (self.widths[0], self.widths[1]),
        }.get(config.qk_norm)
        self.q_norm = RMSNorm(sizes[0], norm_epsilon) if sizes else None
        self.k_norm = RMSNorm(sizes[1], norm_epsilon) if sizes else None
        self.sinks_H = nn.Parameter(torch.zeros(config.num_heads)) if config.has_sinks else None

    def forward(self, x_BSD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """See `Mixer`."""
        assert rotation is not None
        c = self.config
        # Queries and keys stay side by side: half as many operations, which is what one token costs.
        qk, v = self.qkv_proj(x_BSD).split_with_sizes(
            [self.widths[0] + self.widths[1], self.widths[2]], dim=-1
        )
        if c.qk_norm is QKNorm.WHOLE:
            qk = self._normalize(qk)
        if c.qkv_clip is not None:
            qk, v = qk.clamp(-c.qkv_clip, c.qkv_clip), v.clamp(-c.qkv_clip, c.qkv_clip)
        if c.qk_norm is QKNorm.PER_HEAD:
            qk = self._normalize(qk)
        batch, sequence, _ = x_BSD.shape
        qk, v = (heads.view(batch, sequence, -1, c.head_dim) for heads in (qk, v))
        q, k = apply_rotation(qk, rotation, c.rope).split_with_sizes([c.num_heads, c.num_kv_heads], dim=-2)
        y = attend(self.layer_id, q, k, v, SoftmaxRule(c.scale, c.sliding_window, self.sinks_H))
        return self.o_proj(y.flatten(-2))

    def _normalize(self, qk: Tensor) -> Tensor:
        q_norm, k_norm = self.q_norm, self.k_norm
        assert q_norm is not None
        assert k_norm is not None
        q_width, k_width, _ = self.widths
        return rms_norm_pair(qk, (q_norm.weight, k_norm.weight), (q_width, k_width), q_norm.epsilon)
