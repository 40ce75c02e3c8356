"""Keys and values of the sequences in flight, and the attention that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.models import MixerConfig, SoftmaxRule, compute_attention


class SequenceCache:
    """The keys and values of one sequence: fixed storage for ``capacity`` tokens, allocated once.

    keys, values:  per layer (kv_heads, capacity, key or value elements).
    """

    def __init__(
        self, mixers: Sequence[MixerConfig], capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def allocate(num_heads: int, size: int) -> Tensor:
            return torch.empty(num_heads, capacity, size, dtype=dtype, device=device)

        self.capacity = capacity
        self.keys = [allocate(mixer.num_kv_heads, mixer.key_dim) for mixer in mixers]
        self.values = [allocate(mixer.num_kv_heads, mixer.value_dim) for mixer in mixers]
        self.length = 0
        """Tokens whose keys and values are final; set by the engine after a step."""


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

    def __call__(self, layer_id: int, q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule) -> Tensor:
        """See `moesys.models.Attend`; batch is 1 and the sequence holds the tokens of all spans."""
        outputs = [self._attend_span(span, layer_id, q, k, v, rule) for span in self._spans]
        return torch.cat(outputs, dim=1)

    def _attend_span(
        self, span: Span, layer_id: int, q: Tensor, k: Tensor, v: Tensor, rule: SoftmaxRule
    ) -> Tensor:
        rows = slice(span.start, span.end)
        keys, values = span.cache.keys[layer_id], span.cache.values[layer_id]
        keys[:, span.past : span.stop] = k[0, rows].transpose(0, 1)
        values[:, span.past : span.stop] = v[0, rows].transpose(0, 1)
        window = rule.sliding_window
        first = 0 if window is None else max(0, span.past + 1 - window)
        mask = self._find_mask(span, first, window, q)
        return compute_attention(
            q[:, rows],
            keys[None, :, first : span.stop].transpose(1, 2),
            values[None, :, first : span.stop].transpose(1, 2),
            rule,
            mask,
            is_causal=mask is None and span.num_new > 1,
        )

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
