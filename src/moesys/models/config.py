"""The shape of a decoder as plain frozen records, so that models need no schema library."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesys.errors import ShapeError
from moesys.models.mixer import MixerConfig
from moesys.models.norm import NormConfig
from moesys.moe import MoEConfig


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
        ropes = [mixer.rope for mixer in self.mixers if mixer.rope is not None]
        longest = max([self.max_positions, *(rope.scaled_positions or 0 for rope in ropes)])
        return min([longest, *(rope.max_positions for rope in ropes if rope.max_positions is not None)])

    @property
    def num_matmul_parameters_per_token(self) -> int:
        """Weights that multiply each token: mixers, router, chosen experts, head; not the embedding look-up."""
        mixers = sum(mixer.count_weights(self.hidden_size) for mixer in self.mixers)
        feed_forward = sum(_count_active_weights(layer, self.hidden_size) for layer in self.feed_forwards)
        return mixers + feed_forward + self.vocab_size * self.hidden_size

    def compute_training_flops_per_token(self, context: int) -> float:
        """Floating-point operations of forward and backward per token at a causal context of ``context`` tokens.

        6 per active weight and per product of what tokens have in common, such as attention's scores and values
        (PaLM, arXiv 2204.02311, appendix B, with the keys that the causal mask and the window leave).
        """
        products = sum(mixer.count_products(context) for mixer in self.mixers)
        return 6.0 * self.num_matmul_parameters_per_token + 6.0 * products


def _count_active_weights(layer: MoEConfig | DenseConfig, hidden_size: int) -> int:
    if isinstance(layer, DenseConfig):
        return 3 * hidden_size * layer.intermediate_size
    expert = (1 + layer.form.num_halves) * hidden_size * layer.intermediate_size
    experts = (layer.top_k + layer.is_residual) * expert + 3 * hidden_size * layer.shared_intermediate_size
    mixing = hidden_size * (2 * layer.is_residual + layer.shared_expert_gate)
    return experts + mixing + hidden_size * layer.num_experts
