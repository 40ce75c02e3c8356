"""Memory for keys and values in pages, which sequences take as they grow and give back when they end.

A page holds what the mixers of all layers cache of `page_tokens` tokens; what that is, is data of the mixers. Knows
nothing of steps or attention. The idea: the memory is allocated once, however many sequences come and go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesys.errors import GenerationError
from moesys.inference.page_allocator import PageAllocator
from moesys.models import MixerConfig

PAGE_TOKENS = 64
"""Few enough that a short sequence wastes little, many enough that a page is a long read."""


class PagePool:
    """Pages, and the rows of memory that they stand for.

    layers:  per layer the tensors that its mixer caches, each (pages * page_tokens, heads, size): page p holds the rows
             from p * page_tokens on.
    """

    def __init__(
        self,
        mixers: Sequence[MixerConfig],
        num_pages: int,
        page_tokens: int = PAGE_TOKENS,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises `GenerationError` for sizes below 1 of a page, or below 0 of their number."""
        if num_pages < 0 or page_tokens < 1:
            raise GenerationError(
                f"a pool needs num_pages ({num_pages}) of 0 or more and page_tokens ({page_tokens}) of 1 or more"
            )
        self.page_tokens = page_tokens
        self.device = device
        self.allocator = PageAllocator(num_pages)
        rows = num_pages * page_tokens
        self.layers = [
            tuple(
                torch.empty(rows, cached.num_heads, cached.size, dtype=dtype, device=device)
                for cached in mixer.cached
            )
            for mixer in mixers
        ]

    @property
    def num_pages(self) -> int:
        return self.allocator.num_pages

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    @property
    def widths(self) -> list[int]:
        """Elements per token of every tensor."""
        return [tensor.shape[1] * tensor.shape[2] for layer in self.layers for tensor in layer]

    def count_pages(self, num_tokens: int) -> int:
        """Returns how many pages ``num_tokens`` of one sequence take."""
        return -(-num_tokens // self.page_tokens)

    def extend(self, num_pages: int) -> None:
        """Adds pages. What is cached stays; layer by layer the memory is allocated anew."""
        kept = self.num_pages * self.page_tokens if self.allocator.num_free < self.num_pages else 0
        self.allocator.extend(num_pages)
        rows = self.num_pages * self.page_tokens
        for layer_id, layer in enumerate(self.layers):
            self.layers[layer_id] = tuple(_extend(tensor, rows, kept) for tensor in layer)


def _extend(tensor: Tensor, num_rows: int, num_kept: int) -> Tensor:
    longer = tensor.new_empty(num_rows, *tensor.shape[1:])
    longer[:num_kept] = tensor[:num_kept]
    return longer
