"""Scaled dot-product attention in the forms that this project needs: grouped heads, values inside keys, sinks.

Many queries go to torch's fused attention. Few, as in decoding, are products written out in float32: the fused one
repeats its work per query head there, and in bfloat16 is many times slower than reading the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

FEW_QUERIES = 8
"""Of a sequence. Up to here the written-out products are faster on a CPU, with and without groups."""


@dataclass(frozen=True)
class SoftmaxRule:
    """How a layer turns scores into weights.

    scale:           factor of the scores.
    sliding_window:  tokens that a token sees, itself included; None for all earlier ones.
    sinks_H:         (heads,) one more score per head, not scaled, that takes part in the softmax and has no value.
    value_size:      where values are not given, the first elements of each key that are its value.
    """

    scale: float
    sliding_window: int | None = None
    sinks_H: Tensor | None = None
    value_size: int | None = None


def compute_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rule: SoftmaxRule,
    mask: Tensor | None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Attends under an additive mask that broadcasts to (batch, heads, queries, keys), or causally, or to every key.

    q (batch, queries, heads, key_dim), k (batch, keys, kv_heads, key_dim), v (batch, keys, kv_heads, value_dim) or None
    for the first ``rule.value_size`` elements of each key, which are not copied; returns (batch, queries, heads,
    value_dim) in the dtype of ``q``. Causally means that the first query is that of the first key. The window is the
    mask's business.
    """
    if q.shape[1] <= FEW_QUERIES:
        return _attend_few(q, k, v, rule, mask, is_causal=is_causal)
    if rule.sinks_H is not None:
        return _attend_with_sinks(q, k, v, rule, rule.sinks_H, mask, is_causal=is_causal)
    if v is None:
        return _attend_fused(q, k, k, rule, mask, is_causal=is_causal)[..., : rule.value_size]
    # The fused implementations want values as wide as keys.
    width = max(q.shape[3], v.shape[3])
    y = _attend_fused(_widen(q, width), _widen(k, width), _widen(v, width), rule, mask, is_causal=is_causal)
    return y[..., : v.shape[3]]


def count_score_elements(num_heads: int, num_queries: int, num_keys: int) -> int:
    """Returns the most scores and weights that `compute_attention` holds at once; a pass of many queries holds none,
    but may be cut into parts of few."""
    return 3 * num_heads * min(num_queries, FEW_QUERIES) * num_keys


def _attend_fused(
    q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, mask: Tensor | None, *, is_causal: bool
) -> Tensor:
    y = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=rule.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def _widen(x: Tensor, width: int) -> Tensor:
    missing = width - x.shape[-1]
    return functional.pad(x, (0, missing)) if missing else x


def _attend_few(
    q: Tensor, k: Tensor, v: Tensor | None, rule: SoftmaxRule, mask: Tensor | None, *, is_causal: bool
) -> Tensor:
    """The query heads of a group are rows of one product, so that keys are read once and never repeated. A sink is one
    more column of the scores."""
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    k_BKDT = k.to(wide).permute(0, 2, 3, 1)
    v_BKTD = k_BKDT.transpose(2, 3)[..., : rule.value_size] if v is None else v.to(wide).transpose(1, 2)
    q_BKRD = (q.to(wide) * rule.scale).transpose(1, 2).reshape(batch, num_kv_heads, -1, q.shape[3])
    scores_BHQT = (q_BKRD @ k_BKDT).view(batch, num_heads, num_queries, num_keys)
    if is_causal:
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).triu(1)
        scores_BHQT = scores_BHQT.masked_fill(hidden, float("-inf"))
    elif mask is not None:
        scores_BHQT = scores_BHQT + mask
    if rule.sinks_H is not None:
        sinks_BHQ1 = rule.sinks_H.to(wide).view(1, -1, 1, 1).expand(batch, -1, num_queries, 1)
        scores_BHQT = torch.cat([scores_BHQT, sinks_BHQ1], dim=3)
    weights_BHQT = scores_BHQT.softmax(dim=3)[..., :num_keys]
    y_BKRD = weights_BHQT.reshape(batch, num_kv_heads, -1, num_keys) @ v_BKTD
    return y_BKRD.view(batch, num_heads, num_queries, -1).transpose(1, 2).to(q.dtype)


def _attend_with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    rule: SoftmaxRule,
    sinks_H: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
) -> Tensor:
    """A sink is a key before all others whose value is zero. One more element per vector gives it its score: the sink
    over the scale in queries, one in the sink's key, zero in all others."""
    batch, num_queries, num_heads, _ = q.shape
    if v is None:
        v = k[..., : rule.value_size]
    extra = (sinks_H / rule.scale).to(q.dtype).view(1, 1, -1, 1).expand(batch, num_queries, num_heads, 1)
    q = torch.cat([q, extra], dim=3)
    sink = functional.pad(torch.zeros_like(k[:, :1]), (0, 1), value=1.0)
    k = torch.cat([sink, functional.pad(k, (0, 1))], dim=1)
    v = torch.cat([torch.zeros_like(v[:, :1]), v], dim=1)
    if is_causal:
        # A query for the sink's own position keeps the others aligned with their keys.
        q = torch.cat([torch.zeros_like(q[:, :1]), q], dim=1)
    if mask is not None:
        mask = functional.pad(mask, (1, 0))
    y = compute_attention(q, k, v, replace(rule, sinks_H=None), mask, is_causal=is_causal)
    return y[:, 1:] if is_causal else y
