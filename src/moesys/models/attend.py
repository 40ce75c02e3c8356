"""Which keys a query sees, as an argument of the model: packed documents in training, a KV cache in inference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoftmaxRule:
    """How a layer turns scores into weights.

    scale:           factor of the scores.
    sliding_window:  tokens that a token sees, itself included; None for all earlier ones.
    sinks_H:         (heads,) one more score per head, not scaled, that takes part in the softmax and has no value.
    """

    scale: float
    sliding_window: int | None = None
    sinks_H: Tensor | None = None


class Attend(Protocol):
    """Scaled dot-product attention of new queries over the keys and values that are visible to them."""

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule) -> Tensor:
        """Takes q (batch, sequence, heads, key_dim), k (batch, sequence, kv_heads, key_dim) and v (batch, sequence,
        kv_heads, value_dim); returns (batch, sequence, heads, value_dim)."""
        ...


class DocumentAttend:
    """Causal attention inside each document of a packed row.

    document_ids_BS: (batch, sequence) int64; tokens see earlier tokens of their own document only. None means that
    each row is one document.

    On a CPU the documents of packed rows are computed one by one, which costs the sum of their squared lengths
    instead of that of the rows. Elsewhere one masked call is faster than many small ones.
    """

    def __init__(self, document_ids_BS: Tensor | None) -> None:
        self._document_ids_BS = document_ids_BS
        self._masks: dict[tuple[torch.dtype, int | None], Tensor] = {}

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule) -> Tensor:
        """See `Attend`."""
        if len(self._lengths) <= q.shape[0]:
            return attend_causally(q, k, v, rule)
        if q.device.type == "cpu":
            return self._attend_each(q, k, v, rule)
        return compute_attention(q, k, v, rule, self._find_mask(q, rule.sliding_window))

    @cached_property
    def _lengths(self) -> list[int]:
        """The lengths of all documents, row after row; none where each row is one document."""
        ids = self._document_ids_BS
        if ids is None:
            return []
        is_first = torch.ones_like(ids, dtype=torch.bool)
        is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = is_first.flatten().nonzero().squeeze(1)
        return torch.cat([starts, starts.new_tensor([ids.numel()])]).diff().tolist()

    def _attend_each(self, q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule) -> Tensor:
        pieces = (tensor.flatten(0, 1).split(self._lengths) for tensor in (q, k, v))
        outputs = [
            attend_causally(q_S[None], k_S[None], v_S[None], rule)[0]
            for q_S, k_S, v_S in zip(*pieces, strict=True)
        ]
        return torch.cat(outputs).view(*q.shape[:3], v.shape[3])

    def _find_mask(self, q: Tensor, sliding_window: int | None) -> Tensor:
        """Returns the (batch, 1, sequence, sequence) additive mask, made once per forward pass."""
        key = (q.dtype, sliding_window)
        if key not in self._masks:
            ids = self._document_ids_BS
            assert ids is not None
            visible = make_causal_mask(q.shape[1], sliding_window, q.device)
            visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
            self._masks[key] = _make_additive(visible, q.dtype)
        return self._masks[key]


def attend_causally(q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule) -> Tensor:
    """Each row is one sequence of its own; shapes as in `Attend`."""
    length, window = q.shape[1], rule.sliding_window
    if window is None or window >= length:
        return compute_attention(q, k, v, rule, None, is_causal=length > 1)
    visible = make_causal_mask(length, window, q.device)
    return compute_attention(q, k, v, rule, _make_additive(visible, q.dtype))


def compute_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule, mask: Tensor | None, *, is_causal: bool = False
) -> Tensor:
    """Attends under an additive mask that broadcasts to (batch, heads, queries, keys), or causally, or to every key.

    q (batch, queries, heads, key_dim), k (batch, keys, kv_heads, key_dim), v (batch, keys, kv_heads, value_dim);
    returns (batch, queries, heads, value_dim). The window is the mask's business.
    """
    if rule.sinks_H is not None:
        return _attend_with_sinks(q, k, v, rule, rule.sinks_H, mask, is_causal=is_causal)
    # The fast implementations want values as wide as keys.
    width = max(q.shape[3], v.shape[3])
    y = torch.nn.functional.scaled_dot_product_attention(
        _widen(q, width).transpose(1, 2),
        _widen(k, width).transpose(1, 2),
        _widen(v, width).transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=rule.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y[..., : v.shape[3]].transpose(1, 2)


def _widen(x: Tensor, width: int) -> Tensor:
    missing = width - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _attend_with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: SoftmaxRule,
    sinks_H: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
) -> Tensor:
    """A sink is a key before all others whose value is zero. One more element per vector gives it its score: the sink
    over the scale in queries, one in the sink's key, zero in all others."""
    batch, num_queries, num_heads, _ = q.shape
    extra = (sinks_H / rule.scale).to(q.dtype).view(1, 1, -1, 1).expand(batch, num_queries, num_heads, 1)
    q = torch.cat([q, extra], dim=3)
    sink = torch.nn.functional.pad(torch.zeros_like(k[:, :1]), (0, 1), value=1.0)
    k = torch.cat([sink, torch.nn.functional.pad(k, (0, 1))], dim=1)
    v = torch.cat([torch.zeros_like(v[:, :1]), v], dim=1)
    if is_causal:
        # A query for the sink's own position keeps the others aligned with their keys.
        q = torch.cat([torch.zeros_like(q[:, :1]), q], dim=1)
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (1, 0))
    y = compute_attention(q, k, v, replace(rule, sinks_H=None), mask, is_causal=is_causal)
    return y[:, 1:] if is_causal else y


def make_causal_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Returns (1, 1, length, length) bool: True where the query (row) sees the key (column)."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible[None, None]


def _make_additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, float("-inf")
    )
