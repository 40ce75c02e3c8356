"""Keys and values of the sequences in flight, and the attention that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.models import AttentionConfig
from moesys.models.attend import make_causal_mask


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


class CachedAttend:
    """Attention of flat new tokens, each over the cache of its own sequence. Writes their keys and values there."""

    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
        """See `moesys.models.Attend`; batch is 1 and the sequence holds the tokens of all spans."""
        outputs = [self._attend_span(span, layer_id, q, k, v, sliding_window) for span in self._spans]
        return torch.cat(outputs, dim=1)

    def _attend_span(
        self, span: Span, layer_id: int, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None
    ) -> Tensor:
        rows, stop = slice(span.start, span.end), span.past + span.end - span.start
        span.cache.keys[layer_id, :, span.past : stop] = k[0, rows].transpose(0, 1)
        span.cache.values[layer_id, :, span.past : stop] = v[0, rows].transpose(0, 1)
        first = 0 if sliding_window is None else max(0, span.past + 1 - sliding_window)
        mask = make_causal_mask(stop, sliding_window, q.device)[:, :, span.past :, first:]
        y = torch.nn.functional.scaled_dot_product_attention(
            q[:, rows].transpose(1, 2),
            span.cache.keys[layer_id, None, :, first:stop],
            span.cache.values[layer_id, None, :, first:stop],
            attn_mask=None if span.end - span.start == 1 else mask,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return y.transpose(1, 2)
