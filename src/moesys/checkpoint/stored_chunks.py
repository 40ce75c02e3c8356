"""One of our tensors as the bytes of a checkpoint: the way out, piece by piece.

Knows `StoredTensor`; knows nothing of files. Memory for one chunk is needed besides the model's, whatever the strides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moesys.checkpoint.safetensors_file import view_bytes
from moesys.models import StoredTensor

_CHUNK_ELEMENTS = 8 * 2**20


def iterate_chunks(stored: StoredTensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yields the bytes of a tensor as ``dtype`` in the checkpoint's order, each chunk to be used before the next."""
    for part in _cut(stored.view.detach()):
        if part.device.type == "cpu" and part.is_contiguous() and part.dtype == dtype:
            yield view_bytes(part)
        else:
            yield view_bytes(torch.empty(part.shape, dtype=dtype).copy_(part))


def _cut(view: Tensor) -> Iterator[Tensor]:
    """Yields parts of at most `_CHUNK_ELEMENTS` that follow each other in the order of the view's elements."""
    if view.numel() <= _CHUNK_ELEMENTS:
        yield view
        return
    row = math.prod(view.shape[1:])
    if row > _CHUNK_ELEMENTS:
        for part in view:
            yield from _cut(part)
        return
    step = _CHUNK_ELEMENTS // row
    for start in range(0, view.shape[0], step):
        yield view[start : start + step]
