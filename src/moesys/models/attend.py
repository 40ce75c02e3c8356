"""Which keys a query sees, as an argument of the model: packed documents in training, a KV cache in inference."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Attend(Protocol):
    """Scaled dot-product attention of new queries over the keys and values that are visible to them."""

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
        """Takes q (batch, sequence, heads, head_dim) and k, v (batch, sequence, kv_heads, head_dim); returns the
        shape of q."""
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

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
        """See `Attend`."""
        if len(self._lengths) <= q.shape[0]:
            return attend_causally(q, k, v, sliding_window)
        if q.device.type == "cpu":
            return self._attend_each(q, k, v, sliding_window)
        return _attend_masked(q, k, v, self._find_mask(q, sliding_window))

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

    def _attend_each(self, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
        pieces = (tensor.flatten(0, 1).split(self._lengths) for tensor in (q, k, v))
        outputs = [
            attend_causally(q_S[None], k_S[None], v_S[None], sliding_window)[0]
            for q_S, k_S, v_S in zip(*pieces, strict=True)
        ]
        return torch.cat(outputs).view(q.shape)

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


def attend_causally(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
    """Each row is one sequence of its own; shapes as in `Attend`."""
    length = q.shape[1]
    if sliding_window is None or sliding_window >= length:
        return _attend_masked(q, k, v, None)
    return _attend_masked(
        q, k, v, _make_additive(make_causal_mask(length, sliding_window, q.device), q.dtype)
    )


def make_causal_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Returns (1, 1, length, length) bool: True where the query (row) sees the key (column)."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible[None, None]


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attends under an additive mask; plainly causal without one."""
    y = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def _make_additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, float("-inf")
    )
