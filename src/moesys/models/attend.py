"""Which keys a query sees, as an argument of the model: packed documents in training, a KV cache in inference."""

from __future__ import annotations

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
    """

    def __init__(self, document_ids_BS: Tensor | None) -> None:
        self._document_ids_BS = document_ids_BS
        self._masks: dict[tuple[int, torch.dtype, int | None], Tensor] = {}

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
        """See `Attend`."""
        mask = self._find_mask(q, sliding_window)
        y = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return y.transpose(1, 2)

    def _find_mask(self, q: Tensor, sliding_window: int | None) -> Tensor | None:
        """Returns the additive mask (batch or 1, 1, sequence, sequence), made once per forward pass; None for
        plain causal attention."""
        length = q.shape[1]
        if sliding_window is not None and sliding_window >= length:
            sliding_window = None
        if self._document_ids_BS is None and sliding_window is None:
            return None
        key = (length, q.dtype, sliding_window)
        if key not in self._masks:
            visible = make_causal_mask(length, sliding_window, q.device)
            if self._document_ids_BS is not None:
                ids = self._document_ids_BS
                visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
            self._masks[key] = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(
                ~visible, float("-inf")
            )
        return self._masks[key]


def make_causal_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Returns (1, 1, length, length) bool: True where the query (row) sees the key (column)."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible[None, None]
