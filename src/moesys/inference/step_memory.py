"""What a step needs in memory besides weights, keys and values: a bound from the sizes of the model.

Plain arithmetic on records; knows nothing of budgets. Tensors of different layers are never there at once, so the
widest layer counts.
"""

from __future__ import annotations

from moesys.models import DecoderConfig, DenseConfig, MixerConfig
from moesys.moe import MoEConfig

_FLOAT_BYTES = 4
"""Of the float32 in which norms, routers and the sums of experts are computed whatever the weights are."""


def compute_step_bytes(config: DecoderConfig, num_tokens: int, num_positions: int, itemsize: int) -> int:
    """Returns the most bytes that a pass of ``num_tokens`` new tokens holds at once, the sequence then being at most
    ``num_positions`` long. itemsize: of the weights."""
    stream = num_tokens * config.hidden_size * (4 * itemsize + 2 * _FLOAT_BYTES)
    mixer = max(_count_mixer_bytes(mixer, num_tokens, num_positions, itemsize) for mixer in config.mixers)
    windows = {mixer.sliding_window for mixer in config.mixers}
    masks = len(windows) * num_tokens * num_positions * itemsize + 2 * num_tokens * num_positions
    feed_forward = max(
        _count_feed_forward_bytes(layer, config.hidden_size, num_tokens) for layer in config.feed_forwards
    )
    logits = 2 * config.vocab_size * _FLOAT_BYTES
    return stream + masks + max(mixer, feed_forward, logits)


def _count_mixer_bytes(mixer: MixerConfig, num_tokens: int, num_positions: int, itemsize: int) -> int:
    """Queries, keys and values before and after their rotation, the output, and a copy of all visible keys and values,
    which a sink or values narrower than keys need."""
    width = max(mixer.key_dim, mixer.value_dim)
    new = num_tokens * width * (3 * mixer.num_heads + 4 * mixer.num_kv_heads)
    visible = 2 * num_positions * width * mixer.num_kv_heads
    return (new + visible) * max(itemsize, _FLOAT_BYTES)


def _count_feed_forward_bytes(layer: MoEConfig | DenseConfig, hidden_size: int, num_tokens: int) -> int:
    if isinstance(layer, DenseConfig):
        return num_tokens * (3 * layer.intermediate_size + hidden_size) * _FLOAT_BYTES
    inner = (1 + layer.form.num_halves) * layer.intermediate_size
    chosen = num_tokens * layer.top_k * (inner + 2 * hidden_size)
    shared = num_tokens * (3 * layer.shared_intermediate_size + hidden_size)
    router = 6 * num_tokens * layer.num_experts
    return (chosen + shared + router) * _FLOAT_BYTES
