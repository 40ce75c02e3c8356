"""Keys and values of the sequences in flight, and the attention that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.models import AttentionConfig


class SequenceCache:
    """The keys and values of one sequence: fixed storage for ``capacity`` tokens, allocated once."""

    def __init__(
        self,
        num_layers: int,
        config: AttentionConfig,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        """Tokens whose keys and values are final; set by the engine after a step."""

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True)
class Span:
    """The new tokens of one sequence in a flat step: rows [start, end), after ``past`` cached tokens."""

    cache: SequenceCache
    start: int
    end: int
    past: int

    @property
    def num_new(self) -> int:
        return self.end - self.start

    @property
    def stop(self) -> int:
        """The position after the last new token."""
        return self.past + self.num_new


class CachedAttend:
    """Attention of flat new tokens, each over the cache of its own sequence. Writes their keys and values there."""

    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
        """See `moesys.models.Attend`; batch is 1 and the sequence holds the tokens of all spans."""
        outputs = [self._attend_span(span, layer_id, q, k, v, sliding_window) for span in self._spans]
        return torch.cat(outputs, dim=1)

    def _attend_span(
        self, span: Span, layer_id: int, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None
    ) -> Tensor:
        rows = slice(span.start, span.end)
        span.cache.keys[layer_id, :, span.past : span.stop] = k[0, rows].transpose(0, 1)
        span.cache.values[layer_id, :, span.past : span.stop] = v[0, rows].transpose(0, 1)
        first = 0 if sliding_window is None else max(0, span.past + 1 - sliding_window)
        mask = self._find_mask(span, first, sliding_window, q)
        y = torch.nn.functional.scaled_dot_product_attention(
            q[:, rows].transpose(1, 2),
            span.cache.keys[layer_id, None, :, first : span.stop],
            span.cache.values[layer_id, None, :, first : span.stop],
            attn_mask=mask,
            is_causal=mask is None and span.num_new > 1,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return y.transpose(1, 2)

    def _find_mask(self, span: Span, first: int, sliding_window: int | None, q: Tensor) -> Tensor | None:
        """Returns the (new tokens, keys from ``first`` on) additive mask, made once per step; None where one token
        sees every key, or where plain causality from position 0 says it all."""
        if span.num_new == 1 or (span.past == 0 and (sliding_window is None or sliding_window >= span.stop)):
            return None
        key = (span.start, sliding_window)
        if key not in self._masks:
            queries = torch.arange(span.past, span.stop, device=q.device)[:, None]
            keys = torch.arange(first, span.stop, device=q.device)
            hidden = keys > queries
            if sliding_window is not None:
                hidden |= keys <= queries - sliding_window
            mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
            self._masks[key] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[key]
