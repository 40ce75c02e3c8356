"""What a token makes of a model: which bytes it reads and how much it computes. Numbers from the model's shape alone.

Knows nothing of memory or speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesys.models import DecoderConfig, MixerConfig
from moesys.moe import SHARE_TO_STREAM, MoEConfig
from moesys.planning.ceilings import WeightFormat
from moesys.planning.footprint import Footprint


@dataclass(frozen=True)
class RoutedLayer:
    """The experts of a layer.

    flops_per_token:  of the ``top_k`` experts that a token goes to.
    """

    num_experts: int
    top_k: int
    expert_bytes: int
    flops_per_token: float

    def count_touched(self, num_tokens: float) -> float:
        """Returns how many experts ``num_tokens`` tokens are expected to need, each choosing on its own:
        E (1 - (1 - k / E)^n)."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** num_tokens)


@dataclass(frozen=True)
class Activity:
    """A model at work.

    weight_format:      of the experts, or of all weights where there are none.
    core_bytes:         weights besides experts that a step reads; an embedding that is only looked up is none of them.
    core_flops:         per token, of all but experts, attention and the output head.
    head_flops:         per token whose logits are wanted.
    """

    weight_format: WeightFormat
    num_layers: int
    layers: tuple[RoutedLayer, ...]
    core_bytes: int
    core_flops: float
    head_flops: float
    mixers: tuple[MixerConfig, ...]

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return sum(layer.num_experts for layer in self.layers)

    def is_pass(self, num_tokens: float) -> bool:
        """Whether a step of so many tokens is expected to need enough of the experts to be carried out as a pass over
        all of them. Each layer is asked alone then; where layers differ much, some may be carried out otherwise."""
        num_touched = sum(layer.count_touched(num_tokens) for layer in self.layers)
        return num_touched >= SHARE_TO_STREAM * self.num_experts

    def count_expert_bytes(self, num_tokens: float) -> float:
        """Returns the bytes of the experts that a step of so many tokens needs."""
        return sum(layer.count_touched(num_tokens) * layer.expert_bytes for layer in self.layers)

    def count_expert_flops(self, num_tokens: float) -> float:
        """Returns the floating-point operations of experts in a step of so many tokens."""
        return num_tokens * sum(layer.flops_per_token for layer in self.layers)

    def count_attention_flops(self, num_tokens: int, context: int) -> float:
        """Returns the operations of ``num_tokens`` tokens that are not by weights, at the mean of a causal context: of
        a prompt of so many tokens, or of tokens that stand at half of it; in the form of a run that keeps keys."""
        return 2.0 * num_tokens * sum(mixer.count_cached_products(context) for mixer in self.mixers)


def make_activity(
    config: DecoderConfig,
    footprint: Footprint,
    layer_section_bytes: Sequence[int],
    lookup_bytes: int,
) -> Activity:
    """Returns what a token does in a model of this shape: 2 operations per weight that multiplies it and per product of
    what tokens have in common, such as attention's scores (PaLM, arXiv 2204.02311, appendix B, forward only).

    layer_section_bytes:  of one expert in memory, per MoE layer.
    lookup_bytes:         of an embedding that is only looked up; 0 for one that is the output head too.
    """
    routed = [layer for layer in config.feed_forwards if isinstance(layer, MoEConfig)]
    layers = tuple(
        RoutedLayer(
            layer.num_experts, layer.top_k, num_bytes, 2.0 * layer.top_k * _count_weights(layer, config)
        )
        for layer, num_bytes in zip(routed, layer_section_bytes, strict=True)
    )
    head = config.vocab_size * config.hidden_size
    experts = sum(layer.flops_per_token for layer in layers)
    core_bytes = footprint.core_bytes - lookup_bytes
    num_weights = sum(layer.num_experts * _count_weights(layer, config) for layer in routed)
    weight_format = (
        find_weight_format(sum(footprint.section_bytes), num_weights)
        if routed
        else find_weight_format(core_bytes, config.num_matmul_parameters_per_token)
    )
    return Activity(
        weight_format=weight_format,
        num_layers=config.num_layers,
        layers=layers,
        core_bytes=core_bytes,
        core_flops=2.0 * (config.num_matmul_parameters_per_token - head) - experts,
        head_flops=2.0 * head,
        mixers=config.mixers,
    )


def _count_weights(layer: MoEConfig, config: DecoderConfig) -> int:
    return (1 + layer.form.num_halves) * config.hidden_size * layer.intermediate_size


def find_weight_format(num_bytes: int, num_weights: int) -> WeightFormat:
    """Returns how weights are stored of which so many take so many bytes, scales and biases included."""
    if num_bytes < 1.5 * num_weights:
        return WeightFormat.INT8
    return WeightFormat.BF16 if num_bytes < 3 * num_weights else WeightFormat.FP32
