"""The shape of a decoder as plain frozen records, so that models need no schema library."""

from __future__ import annotations

from dataclasses import dataclass

from moesys.errors import ShapeError
from moesys.moe import MoEConfig


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention with rotary embedding."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before the rotary embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    sliding_window: int | None = None
    """Tokens that a token sees, itself included; None for all earlier ones."""
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ShapeError(
                f"num_heads ({self.num_heads}) must be divisible by num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ShapeError(f"head_dim ({self.head_dim}) must be even for the rotary embedding")

    def compute_mean_visible_keys(self, context: int) -> float:
        """How many keys a query sees, itself included, averaged over the ``context`` positions of a sequence.

        With a window of w <= context that is the mean of min(i + 1, w) over positions i; without, (context + 1) / 2.
        """
        window = context if self.sliding_window is None else min(self.sliding_window, context)
        return window - window * (window - 1) / (2 * context)


@dataclass(frozen=True)
class DenseConfig:
    """A dense SwiGLU feed-forward layer."""

    intermediate_size: int


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with one feed-forward record per layer, dense or MoE."""

    vocab_size: int
    hidden_size: int
    attention: AttentionConfig
    feed_forwards: tuple[MoEConfig | DenseConfig, ...]
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    max_positions: int = 2048
    """Tokens of context that the model was made for; nothing is allocated by it."""

    @property
    def num_layers(self) -> int:
        return len(self.feed_forwards)

    @property
    def moe_layer_ids(self) -> list[int]:
        return [i for i, layer in enumerate(self.feed_forwards) if isinstance(layer, MoEConfig)]

    @property
    def num_matmul_parameters_per_token(self) -> int:
        """Weights that multiply each token: attention, router, chosen experts, head; not the embedding look-up."""
        a, d = self.attention, self.hidden_size
        attention = d * (2 * a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        feed_forward = sum(_count_active_weights(layer, d) for layer in self.feed_forwards)
        return self.num_layers * attention + feed_forward + self.vocab_size * d

    def compute_training_flops_per_token(self, context: int) -> float:
        """Floating-point operations of forward and backward per token at a causal context of ``context`` tokens.

        6 per active weight, plus 12 x heads x head_dim per layer and visible key for attention scores and values
        (PaLM, arXiv 2204.02311, appendix B, with the keys that the causal mask and the window leave).
        """
        a = self.attention
        per_key = 12.0 * self.num_layers * a.num_heads * a.head_dim
        return 6.0 * self.num_matmul_parameters_per_token + per_key * a.compute_mean_visible_keys(context)


def _count_active_weights(layer: MoEConfig | DenseConfig, hidden_size: int) -> int:
    if isinstance(layer, DenseConfig):
        return 3 * hidden_size * layer.intermediate_size
    expert = (1 + layer.form.num_halves) * hidden_size * layer.intermediate_size
    experts = (layer.top_k + layer.is_residual) * expert + 3 * hidden_size * layer.shared_intermediate_size
    mixing = hidden_size * (2 * layer.is_residual + layer.shared_expert_gate)
    return experts + mixing + hidden_size * layer.num_experts
