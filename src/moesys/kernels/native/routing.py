"""The small steps of routing in C: choosing, weighing and grouping by expert.

Scores and weights are float32, ids and offsets int64, all on a CPU; others raise `ShapeError`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.native.library import load_library
from moesys.kernels.native.operands import point, require_readable
from moesys.kernels.native.structures import ChoiceCall, GroupingCall, TopKCall, WeighingCall


def choose_top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Returns (tokens, k) int64: the experts with the largest scores, best first; ties go to the lower id, and NaN
    comes before every number. Raises `ShapeError` for a k that is not in 1..experts."""
    num_tokens, num_experts = scores_TE.shape
    _require_k(k, num_experts)
    require_readable(torch.float32, scores_TE)
    scores_TE = scores_TE.contiguous()
    ids_TK = torch.empty(num_tokens, k, dtype=torch.int64, device="cpu")
    threads = torch.get_num_threads()
    call = TopKCall(scores_TE.data_ptr(), num_tokens, num_experts, k, ids_TK.data_ptr(), threads)
    load_library().moesys_top_k(ctypes.byref(call))
    return ids_TK


def choose_and_weigh(
    logits_TE: Tensor,
    scores_TE: Tensor,
    bias_E: Tensor | None,
    k: int,
    smallest_sum: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Returns the ids (tokens * k,), token offsets and weights of `choose_top_k` by biased scores and `weigh_choice`,
    times ``scale``, and whether all logits are finite. Raises `ShapeError` for a k that is not in 1..experts."""
    num_tokens, num_experts = scores_TE.shape
    _require_k(k, num_experts)
    if logits_TE.shape != scores_TE.shape or (bias_E is not None and bias_E.shape != (num_experts,)):
        raise ShapeError(
            f"logits must have the shape of the scores {tuple(scores_TE.shape)} and the bias one entry per expert, got "
            f"{tuple(logits_TE.shape)} and {None if bias_E is None else tuple(bias_E.shape)}"
        )
    require_readable(torch.float32, logits_TE, scores_TE, bias_E)
    logits_TE, scores_TE = logits_TE.contiguous(), scores_TE.contiguous()
    bias_E = None if bias_E is None else bias_E.contiguous()
    ids = torch.empty(num_tokens * k, dtype=torch.int64, device="cpu")
    token_offsets = torch.empty(num_tokens + 1, dtype=torch.int64, device="cpu")
    weights_A = torch.empty(num_tokens * k, dtype=torch.float32, device="cpu")
    call = ChoiceCall(
        logits_TE.data_ptr(),
        scores_TE.data_ptr(),
        point(bias_E),
        num_tokens,
        num_experts,
        k,
        smallest_sum is not None,
        0.0 if smallest_sum is None else smallest_sum,
        scale,
        ids.data_ptr(),
        token_offsets.data_ptr(),
        weights_A.data_ptr(),
        torch.get_num_threads(),
    )
    is_finite = bool(load_library().moesys_choose(ctypes.byref(call)))
    return ids, token_offsets, weights_A, is_finite


def weigh_choice(
    scores_TE: Tensor, expert_ids: Tensor, token_offsets: Tensor, smallest_sum: float | None
) -> Tensor:
    """Returns (assignments,) float32: the scores of the chosen experts, divided by the larger of their sum per token,
    in the order of choice, and ``smallest_sum``; not divided where that is None. Raises `ShapeError` for an index out
    of range."""
    num_tokens, num_experts = scores_TE.shape
    if token_offsets.shape[0] != num_tokens + 1:
        raise ShapeError(
            f"offsets of {token_offsets.shape[0] - 1} tokens do not fit scores of {num_tokens}; give each token its "
            "experts"
        )
    require_readable(torch.float32, scores_TE)
    require_readable(torch.int64, expert_ids, token_offsets)
    scores_TE, expert_ids, token_offsets = (t.contiguous() for t in (scores_TE, expert_ids, token_offsets))
    weights_A = torch.empty(expert_ids.shape[0], dtype=torch.float32, device="cpu")
    call = WeighingCall(
        scores_TE.data_ptr(),
        expert_ids.data_ptr(),
        token_offsets.data_ptr(),
        num_tokens,
        num_experts,
        expert_ids.shape[0],
        smallest_sum is not None,
        0.0 if smallest_sum is None else smallest_sum,
        weights_A.data_ptr(),
    )
    if load_library().moesys_weigh(ctypes.byref(call)):
        raise _make_error(num_experts, expert_ids)
    return weights_A


def group_by_expert(
    expert_ids: Tensor, weights_A: Tensor, token_offsets: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ``row_ids``, ``offsets``, the weights and ``positions`` of the assignments, grouped by expert, as in
    `Rows` and `TokenSum`. Raises `ShapeError` for an index out of range."""
    num_assignments = expert_ids.shape[0]
    if weights_A.shape != expert_ids.shape or token_offsets.shape[0] == 0:
        raise ShapeError(
            f"there must be one weight per expert id ({num_assignments}) and offsets that begin with 0, got "
            f"{weights_A.shape[0]} weights and {token_offsets.shape[0]} offsets"
        )
    require_readable(torch.float32, weights_A)
    require_readable(torch.int64, expert_ids, token_offsets)
    expert_ids, weights_A, token_offsets = (t.contiguous() for t in (expert_ids, weights_A, token_offsets))
    row_ids, positions = torch.empty_like(expert_ids), torch.empty_like(expert_ids)
    offsets = torch.empty(num_experts + 1, dtype=torch.int64, device="cpu")
    sorted_A = torch.empty_like(weights_A)
    call = GroupingCall(
        expert_ids.data_ptr(),
        token_offsets.data_ptr(),
        weights_A.data_ptr(),
        token_offsets.shape[0] - 1,
        num_experts,
        num_assignments,
        row_ids.data_ptr(),
        offsets.data_ptr(),
        positions.data_ptr(),
        sorted_A.data_ptr(),
    )
    status = load_library().moesys_group(ctypes.byref(call))
    if status == 1:
        raise MemoryError("the native grouping by expert found no memory for its counts")
    if status == 2:
        raise _make_error(num_experts, expert_ids)
    return row_ids, offsets, sorted_A, positions


def _require_k(k: int, num_experts: int) -> None:
    if not 1 <= k <= num_experts:
        raise ShapeError(f"k ({k}) must be between 1 and the number of experts ({num_experts})")


def _make_error(num_experts: int, expert_ids: Tensor) -> ShapeError:
    return ShapeError(
        f"expert ids must be in 0..{num_experts - 1}, and the tokens' offsets must rise from 0 to the number of "
        f"assignments ({expert_ids.shape[0]}); one of them does not"
    )
