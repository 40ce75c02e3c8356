"""Held-out documents as windows in which every target is scored exactly once.

Each document stands alone. Windows advance by a stride; the overlap with the window before is context that is
not scored again, so that late tokens are judged with a long history. Knows nothing of models or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from moesys.data.batch import IGNORED_TARGET, Batch
from moesys.data.packing import PackedTokens
from moesys.errors import DataError


@dataclass(frozen=True)
class HeldoutSet:
    """What one evaluation reads: bits per byte is the summed loss in nats / ln 2 / `num_bytes`."""

    batches: Sequence[Batch]
    """Each is built when it is asked for, and not kept."""
    num_bytes: int
    """UTF-8 bytes of the documents covered."""
    num_targets: int
    """Targets scored: every token of the texts and the end of text after each, or what the packed tokens name."""
    num_documents: int


@dataclass(frozen=True)
class _Window:
    start: int
    length: int
    num_context: int
    """Leading positions that an earlier window has scored."""


class _Batches(Sequence[Batch]):
    """Batches of neighbouring windows, read from the packed tokens one at a time."""

    def __init__(self, packed: PackedTokens, windows: Sequence[_Window], batch_sequences: int) -> None:
        self._packed = packed
        self._groups = [windows[i : i + batch_sequences] for i in range(0, len(windows), batch_sequences)]

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [_build_batch(self._packed, group) for group in self._groups[index]]
        return _build_batch(self._packed, self._groups[index])


def heldout_windows(
    packed: PackedTokens,
    sequence_length: int,
    stride: int,
    max_tokens: int | None = None,
    batch_sequences: int = 8,
) -> HeldoutSet:
    """Cuts documents into windows and batches windows of like length.

    Rows shorter than their batch are padded on the right with end of text, document id 1 and ignored targets.

    Args:
        packed: the held-out tokens.
        sequence_length: tokens of the longest window.
        stride: how far each window lies after the one before; at most `sequence_length`.
        max_tokens: a budget of targets. Whole documents are taken in stored order, which is the order of
            content hashes and so independent of what they say, leaving out those that no longer fit; at least
            one is taken.
        batch_sequences: rows per batch.

    Raises:
        DataError: `stride` is not between 1 and `sequence_length`.
    """
    if not 1 <= stride <= sequence_length:
        raise DataError(
            f"stride ({stride}) must be between 1 and sequence_length ({sequence_length}): "
            "a longer one would leave tokens unscored"
        )
    document_ids = _choose_documents(np.diff(packed.document_starts), max_tokens)
    windows = [
        window
        for document_id in document_ids
        for window in _cut_document(
            int(packed.document_starts[document_id]),
            int(packed.document_starts[document_id + 1]),
            sequence_length,
            stride,
        )
    ]
    if packed.is_target is not None:
        windows = [window for window in windows if _count_targets(packed, window)]
    windows.sort(key=lambda window: -window.length)
    return HeldoutSet(
        batches=_Batches(packed, windows, batch_sequences),
        num_bytes=int(packed.document_bytes[document_ids].sum()),
        num_targets=sum(_count_targets(packed, window) for window in windows),
        num_documents=len(document_ids),
    )


def _choose_documents(lengths: np.ndarray, max_tokens: int | None) -> list[int]:
    if max_tokens is None:
        return list(range(len(lengths)))
    chosen: list[int] = []
    budget = max_tokens
    for document_id, length in enumerate(lengths.tolist()):
        if length <= budget:
            chosen.append(document_id)
            budget -= length
    return chosen or [int(lengths.argmin())]


def _cut_document(start: int, end: int, sequence_length: int, stride: int) -> list[_Window]:
    windows: list[_Window] = []
    scored_until = start
    while scored_until < end:
        window_end = min(start + sequence_length, end)
        windows.append(_Window(start, window_end - start, scored_until - start))
        scored_until = window_end
        start += stride
    return windows


def _count_targets(packed: PackedTokens, window: _Window) -> int:
    first, end = window.start + window.num_context + 1, window.start + window.length + 1
    return end - first if packed.is_target is None else int(packed.is_target[first:end].sum())


def _build_batch(packed: PackedTokens, windows: Sequence[_Window]) -> Batch:
    shape = (len(windows), max(window.length for window in windows))
    token_ids_BS = torch.full(shape, packed.end_of_text_id, dtype=torch.int64)
    target_ids_BS = torch.full(shape, IGNORED_TARGET, dtype=torch.int64)
    document_ids_BS = torch.ones(shape, dtype=torch.int64)
    positions_BS = torch.arange(shape[1]).repeat(shape[0], 1)
    for row, window in enumerate(windows):
        length, context = window.length, window.num_context
        stream = packed.tokens[window.start : window.start + length + 1].astype(np.int64)
        token_ids_BS[row, :length] = torch.from_numpy(stream[:-1])
        targets = torch.from_numpy(stream[context + 1 :])
        if packed.is_target is not None:
            is_target = packed.is_target[window.start + context + 1 : window.start + length + 1]
            targets.masked_fill_(~torch.from_numpy(is_target.copy()), IGNORED_TARGET)
        target_ids_BS[row, context:length] = targets
        document_ids_BS[row, :length] = 0
        positions_BS[row, length:] -= length
    return Batch(token_ids_BS, target_ids_BS, document_ids_BS, positions_BS)
