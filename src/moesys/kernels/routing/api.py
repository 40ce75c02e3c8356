"""Choosing, weighing and grouping by expert, each in one call instead of several of torch's.

For one token these steps are dozens of numbers, and what costs is how many operations they take. Their specification is
the torch code of `moesys.moe`, which computes wherever `takes` says no: in training, on other devices, for
other rules. Chosen ids and groups are equal to it; weights too but for the rounding of their sum, which is made in the
order of choice for any number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.fork import require_threads
from moesys.kernels.inference_call import is_inference_call


def takes(values: Tensor, *indices: Tensor) -> bool:
    """Whether the functions of this module compute for these scores or weights and ids or offsets: float32 and int64 on
    a CPU, without gradients, and no other kernel than native asked for."""
    for index in indices:
        if index.dtype is not torch.int64 or not index.is_cpu:
            return False
    return values.dtype is torch.float32 and is_inference_call(values)


def choose_top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Returns (tokens, k) int64: the experts with the largest scores, best first; ties go to the lower id, and NaN
    comes before every number, as in `torch.sort`.

    scores_TE: (tokens, experts). Raises `ShapeError` for a k that is not in 1..experts.
    """
    require_threads()
    return native.choose_top_k(scores_TE, k)


def choose_and_weigh(
    logits_TE: Tensor,
    scores_TE: Tensor,
    bias_E: Tensor | None,
    k: int,
    smallest_sum: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """`choose_top_k` and `weigh_choice` in one call, for every router that takes the k best: the same bits.

    logits_TE, scores_TE: (tokens, experts). bias_E: (experts,), added to the scores for the choice alone. Weights are
    multiplied by ``scale`` at last. Returns the expert ids (tokens * k,), the offsets (tokens + 1,) and the weights of
    the assignments, and whether all logits are finite. Raises `ShapeError` for a k that is not in 1..experts, and other
    shapes.
    """
    require_threads()
    return native.choose_and_weigh(logits_TE, scores_TE, bias_E, k, smallest_sum, scale)


def weigh_choice(
    scores_TE: Tensor, expert_ids: Tensor, token_offsets: Tensor, smallest_sum: float | None
) -> Tensor:
    """Returns (assignments,): the scores of the chosen experts, divided per token by the larger of their sum and
    ``smallest_sum``; as they are where that is None.

    scores_TE: (tokens, experts). expert_ids: (assignments,). token_offsets: (tokens + 1,). Raises `ShapeError` for an
    index out of range, or offsets of other tokens.
    """
    return native.weigh_choice(scores_TE, expert_ids, token_offsets, smallest_sum)


def group_by_expert(
    expert_ids: Tensor, weights_A: Tensor, token_offsets: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups assignments by expert, within each in the order of tokens and choices.

    expert_ids, weights_A: (assignments,). token_offsets: (tokens + 1,). Returns the ``row_ids`` and ``offsets`` of
    `Rows`, the weights in that order, and the ``positions`` of `TokenSum`. Raises `ShapeError` for an index out of
    range, or another number of weights.
    """
    return native.group_by_expert(expert_ids, weights_A, token_offsets, num_experts)
