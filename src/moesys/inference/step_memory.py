"""What a step needs in memory besides weights, keys and values: a bound from the sizes of the model.

Plain arithmetic on records; knows nothing of budgets. Tensors of different layers are never there at once, so the
widest layer counts.
"""

from __future__ import annotations

from moesys.inference.decode_attention import PIECE_TOKENS
from moesys.models import DecoderConfig, DenseConfig
from moesys.moe import MoEConfig

_FLOAT_BYTES = 4
"""Of the float32 in which norms, routers, attention of single tokens and the sums of experts are computed whatever the
weights are."""
_DRAW_BYTES = 40
"""Per token of the vocabulary, for drawing one: copies of the logits in float32 and float64."""


def compute_step_bytes(
    config: DecoderConfig, num_tokens: int, num_positions: int, itemsize: int, num_sequences: int = 1
) -> int:
    """Returns the most bytes that a step holds at once.

    num_tokens:     new ones of all sequences together.
    num_positions:  of the longest sequence, the new tokens included.
    itemsize:       of the weights.
    num_sequences:  in the step, each with the logits of one token.
    """
    stream = num_tokens * config.hidden_size * (4 * itemsize + 2 * _FLOAT_BYTES)
    mixer = max(mixer.count_step_elements(num_tokens, num_positions) for mixer in config.mixers)
    windows = {mixer.sliding_window for mixer in config.mixers}
    # One more, with a column for the sinks, and two of truth values while one is made.
    masks = num_tokens * num_positions * ((len(windows) + 1) * itemsize + 2)
    feed_forward = max(
        _count_feed_forward_bytes(layer, config.hidden_size, num_tokens) for layer in config.feed_forwards
    )
    logits = config.vocab_size * (num_sequences * (_FLOAT_BYTES + itemsize) + _DRAW_BYTES)
    cached = [[part.num_elements for part in mixer.cached] for mixer in config.mixers]
    # Of all that one sequence keeps of a layer, where its pages do not lie in a row.
    gathered = num_positions * max(map(sum, cached)) * itemsize
    scratch = PIECE_TOKENS * max((size for sizes in cached for size in sizes), default=0) * _FLOAT_BYTES
    mixing = mixer * max(itemsize, _FLOAT_BYTES) + gathered + masks
    return stream + scratch + max(mixing, masks + feed_forward, logits)


def _count_feed_forward_bytes(layer: MoEConfig | DenseConfig, hidden_size: int, num_tokens: int) -> int:
    if isinstance(layer, DenseConfig):
        return num_tokens * _count_dense_elements(layer.intermediate_size, hidden_size) * _FLOAT_BYTES
    inner = (1 + layer.form.num_halves) * layer.intermediate_size
    chosen = num_tokens * layer.top_k * (inner + 2 * hidden_size)
    shared = num_tokens * _count_dense_elements(layer.shared_intermediate_size, hidden_size)
    router = 6 * num_tokens * layer.num_experts
    return (chosen + shared + router) * _FLOAT_BYTES


def _count_dense_elements(inner_size: int, hidden_size: int) -> int:
    """Gate and up, the activated gate and their product; or gate and up, the product and the result."""
    return max(4 * inner_size, 3 * inner_size + hidden_size)
