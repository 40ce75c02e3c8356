"""The shape of a decoder as plain frozen records, so that models need no schema library."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from moesys.errors import ShapeError
from moesys.models.norm import NormConfig
from moesys.models.rope import RopeConfig
from moesys.moe import MoEConfig


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
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def key_dim(self) -> int:
        """Elements of a key; of a value, `value_dim`."""
        return self.head_dim

    @property
    def value_dim(self) -> int:
        return self.head_dim

    def count_weights(self, hidden_size: int) -> int:
        """Weights that multiply each token, without biases and norms."""
        return hidden_size * (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim


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
        return self.nope_head_dim + self.rope.dim

    @property
    def value_dim(self) -> int:
        return self.value_head_dim

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def sliding_window(self) -> int | None:
        """None: every token sees all earlier ones."""
        return None

    def count_weights(self, hidden_size: int) -> int:
        """Weights that multiply each token, without biases and norms."""
        query = self.num_heads * self.key_dim
        queries = hidden_size * query if self.query_rank is None else self.query_rank * (hidden_size + query)
        latent = hidden_size * (self.latent_rank + self.rope.dim)
        expanded = self.latent_rank * self.num_heads * (self.nope_head_dim + self.value_head_dim)
        return queries + latent + expanded + self.num_heads * self.value_head_dim * hidden_size


MixerConfig = AttentionConfig | LatentAttentionConfig
"""How a block mixes tokens."""


@dataclass(frozen=True)
class DenseConfig:
    """A dense SwiGLU feed-forward layer."""

    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with one mixer and one feed-forward record, dense or MoE, per layer."""

    vocab_size: int
    hidden_size: int
    mixers: tuple[MixerConfig, ...]
    feed_forwards: tuple[MoEConfig | DenseConfig, ...]
    norm: NormConfig = field(default_factory=NormConfig)
    tie_embeddings: bool = True
    head_bias: bool = False
    max_positions: int = 2048
    """Tokens of context that the model was made for; nothing is allocated by it."""
    embedding_scale: float = 1.0
    """Multiplies the embedding (Granite)."""
    residual_scale: float = 1.0
    """Multiplies what a mixer or feed-forward layer adds to the residual stream (Granite)."""
    logit_divisor: float = 1.0
    """Divides the logits (Granite)."""

    def __post_init__(self) -> None:
        if len(self.mixers) != len(self.feed_forwards):
            raise ShapeError(
                f"every layer needs a mixer and a feed-forward record, got {len(self.mixers)} and "
                f"{len(self.feed_forwards)}"
            )
        if self.head_bias and self.tie_embeddings:
            raise ShapeError(
                "a head that is the embedding table (tie_embeddings) has no bias; drop head_bias"
            )

    @property
    def num_layers(self) -> int:
        return len(self.feed_forwards)

    @property
    def moe_layer_ids(self) -> list[int]:
        return [i for i, layer in enumerate(self.feed_forwards) if isinstance(layer, MoEConfig)]

    @property
    def position_limit(self) -> int:
        """Tokens of a sequence: ``max_positions``, or what the rotary embeddings are scaled to or end at."""
        limits = [mixer.rope.max_positions for mixer in self.mixers]
        scaled = [mixer.rope.scaled_positions or 0 for mixer in self.mixers]
        longest = max([self.max_positions, *scaled])
        return min([longest, *(limit for limit in limits if limit is not None)])

    @property
    def num_matmul_parameters_per_token(self) -> int:
        """Weights that multiply each token: mixers, router, chosen experts, head; not the embedding look-up."""
        mixers = sum(mixer.count_weights(self.hidden_size) for mixer in self.mixers)
        feed_forward = sum(_count_active_weights(layer, self.hidden_size) for layer in self.feed_forwards)
        return mixers + feed_forward + self.vocab_size * self.hidden_size

    def compute_training_flops_per_token(self, context: int) -> float:
        """Floating-point operations of forward and backward per token at a causal context of ``context`` tokens.

        6 per active weight, plus 6 x heads x (key + value elements) per layer and visible key for attention scores and
        values (PaLM, arXiv 2204.02311, appendix B, with the keys that the causal mask and the window leave).
        """
        attention = sum(
            6.0
            * m.num_heads
            * (m.key_dim + m.value_dim)
            * compute_mean_visible_keys(m.sliding_window, context)
            for m in self.mixers
        )
        return 6.0 * self.num_matmul_parameters_per_token + attention


def compute_mean_visible_keys(sliding_window: int | None, context: int) -> float:
    """How many keys a query sees, itself included, averaged over the ``context`` positions of a sequence.

    With a window of w <= context that is the mean of min(i + 1, w) over positions i; without, (context + 1) / 2.
    """
    window = context if sliding_window is None else min(sliding_window, context)
    return window - window * (window - 1) / (2 * context)


def _count_active_weights(layer: MoEConfig | DenseConfig, hidden_size: int) -> int:
    if isinstance(layer, DenseConfig):
        return 3 * hidden_size * layer.intermediate_size
    expert = (1 + layer.form.num_halves) * hidden_size * layer.intermediate_size
    experts = (layer.top_k + layer.is_residual) * expert + 3 * hidden_size * layer.shared_intermediate_size
    mixing = hidden_size * (2 * layer.is_residual + layer.shared_expert_gate)
    return experts + mixing + hidden_size * layer.num_experts
