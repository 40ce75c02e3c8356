"""The entry point of the fused output head and loss."""

from __future__ import annotations

from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.cross_entropy import chunked


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, target_ids_T: Tensor, chunk_tokens: int
) -> Tensor:
    """Computes the summed cross entropy of ``hidden @ weight.T`` in nats, ``chunk_tokens`` rows of logits at a time.

    hidden_TD: (tokens, hidden) float. weight_VD: (vocabulary, hidden), same dtype. target_ids_T: (tokens,) int64,
    ``IGNORED_TARGET`` where there is none. Returns a float32 scalar (float64 for float64 inputs): the sum, not the
    mean, because only the caller knows how many targets the global step has. Raises `ShapeError`.
    """
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ShapeError(
            f"hidden {tuple(hidden_TD.shape)} and weight {tuple(weight_VD.shape)} must be (tokens, hidden) and "
            "(vocabulary, hidden) with the same hidden size"
        )
    if hidden_TD.dtype != weight_VD.dtype:
        raise ShapeError(
            f"hidden is {hidden_TD.dtype} but the weight is {weight_VD.dtype}; cast hidden to the weight's dtype"
        )
    if target_ids_T.shape != hidden_TD.shape[:1]:
        raise ShapeError(
            f"there must be one target per token: {hidden_TD.shape[0]} tokens, targets {tuple(target_ids_T.shape)}"
        )
    if chunk_tokens < 1:
        raise ShapeError(f"chunk_tokens ({chunk_tokens}) must be 1 or more")
    return chunked.linear_cross_entropy(hidden_TD, weight_VD, target_ids_T, chunk_tokens)
