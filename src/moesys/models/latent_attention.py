"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values come from one narrow latent per token.

Two forms of the same products. Where nothing is kept, keys and values are expanded from the latents, and each head
attends to its own. Where keys are kept, the latents are: the expanding matrix is multiplied to the queries and to the
output instead (the paper's section 2.1.2 calls it absorbed), and all heads attend to the same narrow key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.kernels import grouped_linear
from moesys.models.attend import Attend
from moesys.models.mixer import CachedTensor, Mixer
from moesys.models.norm import NormConfig, RMSNorm
from moesys.models.rope import RopeConfig
from moesys.models.rotary import Rotation, apply_rotation
from moesys.models.softmax_attention import SoftmaxRule, count_score_elements
from moesys.models.visible_keys import compute_mean_visible_keys
from moesys.moe import Linear


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one narrow latent per token.

    A query is [nope | rope] elements per head; a key has its own nope elements per head and shares the rope ones.
    """

    num_heads: int
    query_rank: int | None
    """Width of the queries' latent; None for one full projection."""
    latent_rank: int
    """Width of the latent of keys and values."""
    nope_head_dim: int
    value_head_dim: int
    rope: RopeConfig
    bias: bool = False
    """Whether the projections into the latents and the output have biases."""
    softmax_scale: float | None = None
    """Factor of the scores; None for 1 / sqrt(nope + rope elements)."""
    latent_epsilon: float = 1e-6
    """Of the norms of both latents."""

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def key_dim(self) -> int:
        """Elements of an expanded key; of a value, `value_dim`."""
        return self.nope_head_dim + self.rope.dim

    @property
    def value_dim(self) -> int:
        return self.value_head_dim

    @property
    def latent_key_dim(self) -> int:
        """Elements of a latent with its rope key behind it, which are all that is kept of a token."""
        return self.latent_rank + self.rope.dim

    @property
    def kind(self) -> str:
        """See `MixerConfig`."""
        return "latent attention"

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def sliding_window(self) -> int | None:
        """None: every token sees all earlier ones."""
        return None

    @property
    def cached(self) -> tuple[CachedTensor, ...]:
        """See `MixerConfig`: the latent, normalised, and behind it the rope key, turned."""
        return (CachedTensor(1, self.latent_key_dim),)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """See `MixerConfig`."""
        return ()

    def make(self, hidden_size: int, norm: NormConfig, layer_id: int) -> LatentAttention:
        """See `MixerConfig`."""
        return LatentAttention(hidden_size, self, layer_id)

    def count_weights(self, hidden_size: int) -> int:
        """See `MixerConfig`."""
        query = self.num_heads * self.key_dim
        queries = hidden_size * query if self.query_rank is None else self.query_rank * (hidden_size + query)
        latent = hidden_size * (self.latent_rank + self.rope.dim)
        expanded = self.latent_rank * self.num_heads * (self.nope_head_dim + self.value_head_dim)
        return queries + latent + expanded + self.num_heads * self.value_head_dim * hidden_size

    def count_products(self, context: int) -> float:
        """See `MixerConfig`: scores and values of expanded keys."""
        visible = compute_mean_visible_keys(None, context)
        return self.num_heads * (self.key_dim + self.value_dim) * visible

    def count_cached_products(self, context: int) -> float:
        """See `MixerConfig`: scores and values of latents, of which every head takes all."""
        visible = compute_mean_visible_keys(None, context)
        return self.num_heads * (self.latent_key_dim + self.latent_rank) * visible

    def count_step_elements(self, num_tokens: int, num_positions: int) -> int:
        """See `MixerConfig`: queries in both forms and before and after their rotation, keys, the output in both forms,
        scores, and a copy of all visible keys."""
        queries = self.num_heads * (2 * self.key_dim + 2 * self.latent_key_dim)
        outputs = self.num_heads * (self.value_dim + 2 * self.latent_rank)
        new = num_tokens * (queries + outputs + 3 * self.latent_key_dim)
        scores = count_score_elements(self.num_heads, num_tokens, num_positions)
        return new + scores + num_positions * self.latent_key_dim


class LatentAttention(Mixer):
    """Causal self-attention over keys and values that share a latent.

    q_proj, or q_a_proj, q_a_norm and q_b_proj with ``query_rank``: queries, per head [nope | rope] rows.
    kv_a_proj:  the latent's rows, then those of the rope key that all heads share.
    kv_b_proj:  per head its nope key rows, then its value rows.
    """

    def __init__(self, hidden_size: int, config: LatentAttentionConfig, layer_id: int) -> None:
        super().__init__()
        self.config = c = config
        self.layer_id = layer_id
        query_width = c.num_heads * c.key_dim
        if c.query_rank is None:
            self.q_proj = Linear(hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = Linear(hidden_size, c.query_rank, bias=c.bias)
            self.q_a_norm = RMSNorm(c.query_rank, c.latent_epsilon)
            self.q_b_proj = Linear(c.query_rank, query_width, bias=False)
        self.kv_a_proj = Linear(hidden_size, c.latent_rank + c.rope.dim, bias=c.bias)
        self.kv_a_norm = RMSNorm(c.latent_rank, c.latent_epsilon)
        self.kv_b_proj = Linear(c.latent_rank, c.num_heads * (c.nope_head_dim + c.value_head_dim), bias=False)
        self.o_proj = Linear(c.num_heads * c.value_head_dim, hidden_size, bias=c.bias)

    def forward(self, x_BSD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """See `Mixer`."""
        assert rotation is not None
        c = self.config
        q = self._project_queries(x_BSD).unflatten(-1, (c.num_heads, -1))
        q_nope, q_rope = q.split([c.nope_head_dim, c.rope.dim], dim=-1)
        latent, k_rope = self.kv_a_proj(x_BSD).split([c.latent_rank, c.rope.dim], dim=-1)
        latent = self.kv_a_norm(latent)
        ropes = apply_rotation(torch.cat([q_rope, k_rope.unsqueeze(-2)], dim=-2), rotation, c.rope)
        q_rope, k_rope = ropes.split([c.num_heads, 1], dim=-2)
        compute = self._attend_to_latents if attend.caches_latents else self._attend_to_heads
        y = compute(q_nope, q_rope, latent, k_rope, attend)
        return self.o_proj(y.flatten(-2))

    def _project_queries(self, x_BSD: Tensor) -> Tensor:
        if self.config.query_rank is None:
            return self.q_proj(x_BSD)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))

    def _attend_to_heads(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, attend: Attend
    ) -> Tensor:
        c = self.config
        kv = self.kv_b_proj(latent).unflatten(-1, (c.num_heads, -1))
        k_nope, v = kv.split([c.nope_head_dim, c.value_head_dim], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:-1], -1)], dim=-1)
        return attend(self.layer_id, q, k, v, SoftmaxRule(c.scale))

    def _attend_to_latents(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, attend: Attend
    ) -> Tensor:
        """q_nope . (W_k latent) = (W_k^T q_nope) . latent, and likewise for the values: products with a matrix per
        head, in which a token's bits do not depend on how many others there are."""
        c = self.config
        weight_HFR = self.kv_b_proj.weight.unflatten(0, (c.num_heads, -1))
        key_HNR, value_HVR = weight_HFR.split([c.nope_head_dim, c.value_head_dim], dim=1)
        q_latent = grouped_linear(q_nope.flatten(0, 1), key_HNR.transpose(1, 2)).unflatten(
            0, q_nope.shape[:2]
        )
        q = torch.cat([q_latent, q_rope], dim=-1)
        k = torch.cat([latent.unsqueeze(-2), k_rope], dim=-1)
        y = attend(self.layer_id, q, k, None, SoftmaxRule(c.scale, value_size=c.latent_rank))
        return grouped_linear(y.flatten(0, 1), value_HVR).unflatten(0, y.shape[:2])
