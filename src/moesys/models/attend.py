"""How tokens reach each other, as an argument of the model: packed documents in training, a cache in inference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from moesys.models.softmax_attention import SoftmaxRule, compute_attention

State = tuple[Tensor, ...]
"""What a recurrence keeps of the tokens so far, float32."""

Recurrence = Callable[[Tensor, State | None], tuple[Tensor, State]]
"""From consecutive tokens of one sequence, (sequence, width), and the state before them, None at the sequence's
beginning, to (sequence, other width) and the state after them."""


class Attend(Protocol):
    """A mixer's way to the other tokens of each token's sequence: by attention or by a recurrence."""

    @property
    def caches_latents(self) -> bool:
        """Whether keys are kept for later tokens, so that a mixer had better hand over its latents than what they
        expand to."""
        ...

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor | None, rule: SoftmaxRule) -> Tensor:
        """Attends with new queries to the keys that are visible to them.

        Takes q (batch, sequence, heads, key_dim), k (batch, sequence, kv_heads, key_dim) and v (batch, sequence,
        kv_heads, value_dim), or None where the first ``rule.value_size`` elements of a key are its value; returns
        (batch, sequence, heads, value_dim).
        """
        ...

    def scan(self, layer_id: int, x: Tensor, recurrence: Recurrence) -> Tensor:
        """Runs a recurrence over the new tokens of each sequence, from the state that it left behind.

        Takes (batch, sequence, width), returns (batch, sequence, other width).
        """
        ...


class DocumentAttend:
    """Causal attention inside each document of a packed row; nothing is kept.

    document_ids_BS: (batch, sequence) int64; tokens see earlier tokens of their own document only. None means that
    each row is one document.

    On a CPU the documents of packed rows are computed one by one, which costs the sum of their squared lengths
    instead of that of the rows. Elsewhere one masked call is faster than many small ones.
    """

    caches_latents = False

    def __init__(self, document_ids_BS: Tensor | None) -> None:
        self._document_ids_BS = document_ids_BS
        self._masks: dict[tuple[torch.dtype, int | None], Tensor] = {}

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor | None, rule: SoftmaxRule) -> Tensor:
        """See `Attend`."""
        if len(self._lengths) <= q.shape[0]:
            return attend_causally(q, k, v, rule)
        if q.device.type == "cpu":
            return self._attend_each(q, k, v, rule)
        return compute_attention(q, k, v, rule, self._find_mask(q, rule.sliding_window))

    def scan(self, layer_id: int, x: Tensor, recurrence: Recurrence) -> Tensor:
        """See `Attend`."""
        lengths = self._lengths or [x.shape[1]] * x.shape[0]
        outputs = [recurrence(x_SW, None)[0] for x_SW in x.flatten(0, 1).split(lengths)]
        return torch.cat(outputs).unflatten(0, x.shape[:2])

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

    def _attend_each(self, q: Tensor, k: Tensor, v: Tensor | None, rule: SoftmaxRule) -> Tensor:
        def split(tensor: Tensor) -> tuple[Tensor, ...]:
            return tensor.flatten(0, 1).unsqueeze(0).split(self._lengths, dim=1)

        values = [None] * len(self._lengths) if v is None else split(v)
        outputs = [attend_causally(*heads, rule) for heads in zip(split(q), split(k), values, strict=True)]
        return torch.cat(outputs, dim=1).unflatten(1, q.shape[:2]).squeeze(0)

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


def attend_causally(q: Tensor, k: Tensor, v: Tensor | None, rule: SoftmaxRule) -> Tensor:
    """Each row is one sequence of its own; shapes as in `Attend`."""
    length, window = q.shape[1], rule.sliding_window
    if window is None or window >= length:
        return compute_attention(q, k, v, rule, None, is_causal=length > 1)
    visible = make_causal_mask(length, window, q.device)
    return compute_attention(q, k, v, rule, _make_additive(visible, q.dtype))


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
