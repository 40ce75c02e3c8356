"""Moves bytes from open files into memory: several reads in flight, in the order of the file.

Knows pieces (spans of files and what becomes of their bytes) and threads; knows nothing of tensors' names or models.
Workers only read, which needs no interpreter lock; where bytes go through staging memory, the caller's thread converts
them with all of torch's threads while the workers read on. A fixed number of buffers bounds the memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.checkpoint.model_files import Span
from moesys.errors import ModelFormatError

PIECE_BYTES = 8 * 2**20
"""Most bytes of a piece: large enough for a disk's full rate, small enough to overlap reading and converting."""

NUM_READERS = 4
_NUM_IN_FLIGHT = 2 * NUM_READERS


@dataclass(frozen=True)
class DirectPiece:
    """Bytes that a file holds exactly as memory needs them.

    views: the memory, in the file's order; at most 1,000 of them, which is what one system call takes.
    """

    span: Span
    views: tuple[memoryview, ...]

    @property
    def num_bytes(self) -> int:
        return self.span.num_bytes


@dataclass(frozen=True)
class StagedPiece:
    """Bytes that need converting.

    spans:    of one or several tensors, at most `PIECE_BYTES` together.
    deliver:  gets the bytes of each span as a uint8 tensor, which it must not keep.
    """

    spans: tuple[Span, ...]
    deliver: Callable[[tuple[Tensor, ...]], None]

    @property
    def num_bytes(self) -> int:
        """Of the first span: what belongs to it, such as scales, is not counted."""
        return self.spans[0].num_bytes


Piece = DirectPiece | StagedPiece


def stream(pieces: Iterable[Piece], on_read: Callable[[int], None]) -> None:
    """Reads every piece and delivers it; ``on_read`` gets the bytes of each that is done, in order.

    Raises `ModelFormatError` when a file cannot be read or is shorter than it was when it was opened.
    """
    buffers = [torch.empty(0, dtype=torch.uint8)] * _NUM_IN_FLIGHT
    in_flight: deque[tuple[Piece, Tensor, Future[None]]] = deque()

    def finish_oldest() -> None:
        piece, buffer, reading = in_flight.popleft()
        reading.result()
        if isinstance(piece, StagedPiece):
            piece.deliver(_split_staged(buffer, piece.spans))
        buffers.append(buffer)
        on_read(piece.num_bytes)

    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="moesys-read") as readers:
        try:
            for piece in pieces:
                if not buffers:
                    finish_oldest()
                buffer = buffers.pop()
                if isinstance(piece, StagedPiece):
                    buffer = _grow(buffer, piece)
                    parts = zip(piece.spans, _split_staged(buffer, piece.spans), strict=True)
                    reads = [(span, (part.numpy().data,)) for span, part in parts]
                else:
                    reads = [(piece.span, piece.views)]
                in_flight.append((piece, buffer, readers.submit(_read_spans, reads)))
            while in_flight:
                finish_oldest()
        finally:
            readers.shutdown(wait=True, cancel_futures=True)


def _grow(buffer: Tensor, piece: StagedPiece) -> Tensor:
    """Returns a buffer that holds the piece: the one given, where it is large enough."""
    needed = sum(_padded(span.num_bytes) for span in piece.spans)
    if buffer.numel() >= needed:
        return buffer
    return torch.empty(max(needed, min(2 * buffer.numel(), PIECE_BYTES)), dtype=torch.uint8)


def _split_staged(buffer: Tensor, spans: Iterable[Span]) -> tuple[Tensor, ...]:
    parts, start = [], 0
    for span in spans:
        parts.append(buffer[start : start + span.num_bytes])
        start += _padded(span.num_bytes)
    return tuple(parts)


def _padded(num_bytes: int) -> int:
    """Returns the size with which the next part is aligned for every dtype."""
    return -(-num_bytes // 8) * 8


def _read_spans(reads: Iterable[tuple[Span, tuple[memoryview, ...]]]) -> None:
    for span, views in reads:
        _read_span(span, list(views))


def _read_span(span: Span, views: list[memoryview]) -> None:
    offset = span.offset
    while views:
        try:
            taken = os.preadv(span.descriptor, views, offset)
        except OSError as error:
            raise ModelFormatError(f"cannot read {span.path}: {error.strerror or error}") from None
        if not taken:
            missing = span.offset + span.num_bytes - offset
            raise ModelFormatError(
                f"{span.path} became shorter while it was read: {missing} bytes are missing"
            )
        offset += taken
        views = _drop_front(views, taken)


def _drop_front(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    for i, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[i + 1 :]]
        num_bytes -= len(view)
    return []
