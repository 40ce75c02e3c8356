"""Attention of one new token over the cached tokens of its sequence, wherever their pages lie.

Scores and sums are float32 whatever the cache holds, which on CPUs is faster than attention in bfloat16, too. The
cached tokens are taken in pieces of `PIECE_TOKENS`: one that lies in one run of float32 rows is read in place, any
other is copied and widened in scratch memory that stays in the processor's cache. The order of sums depends on
positions alone, so that neither other sequences nor the places of pages change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE_TOKENS = 512


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a sequence.

    runs:         rows of memory that hold them, in order.
    num_skipped:  of the first tokens, which are not seen. Pieces begin at the edge of a page, so that a token lies
                  equally aligned in place and in scratch memory.
    """

    runs: Sequence[slice]
    num_skipped: int = 0

    @property
    def num_rows(self) -> int:
        return sum(run.stop - run.start for run in self.runs)

    @property
    def num_visible(self) -> int:
        return self.num_rows - self.num_skipped


class PieceReader:
    """Reads pieces as float32. What it returns is good until the next read."""

    def __init__(self, widths: Sequence[int], device: torch.device) -> None:
        """widths: elements per token of the tensors that will be read; memory is allocated for the widest."""
        self._scratch = torch.empty(PIECE_TOKENS * max(widths, default=0), dtype=torch.float32, device=device)

    @property
    def num_bytes(self) -> int:
        return self._scratch.nbytes

    def read(self, cached: Tensor, piece: Piece) -> Tensor:
        """Returns the (visible tokens, heads, size) of (rows, heads, size)."""
        if cached.dtype == torch.float32 and len(piece.runs) == 1:
            [run] = piece.runs
            return cached[run.start + piece.num_skipped : run.stop]
        shape = (piece.num_rows, *cached.shape[1:])
        copied = self._scratch[: math.prod(shape)].view(shape)
        end = 0
        for run in piece.runs:
            start, end = end, end + run.stop - run.start
            copied[start:end] = cached[run]
        return copied[piece.num_skipped :]


def attend_one(
    q_HD: Tensor,
    keys: Tensor,
    values: Tensor,
    pieces: Sequence[Piece],
    sinks_H: Tensor | None,
    reader: PieceReader,
) -> Tensor:
    """Attends from one token to all visible tokens of ``pieces``; the window is the pieces' business.

    q_HD (heads, key_dim) float32, scaled; keys (rows, kv_heads, key_dim) and values (rows, kv_heads, value_dim) of any
    dtype; sinks as in `SoftmaxRule`. Returns (heads, value_dim) float32.
    """
    q_KGD = q_HD.view(keys.shape[1], -1, q_HD.shape[1])
    scores = [torch.bmm(q_KGD, reader.read(keys, piece).permute(1, 2, 0)) for piece in pieces]
    weights_KGT = _compute_weights(torch.cat(scores, dim=2) if len(scores) > 1 else scores[0], sinks_H)
    first, *others = pieces
    if not others:
        return torch.bmm(weights_KGT, reader.read(values, first).transpose(0, 1)).flatten(0, 1)
    parts = weights_KGT.split([piece.num_visible for piece in pieces], dim=2)
    total_KGD = torch.bmm(parts[0], reader.read(values, first).transpose(0, 1))
    for part_KGT, piece in zip(parts[1:], others, strict=True):
        total_KGD += torch.bmm(part_KGT, reader.read(values, piece).transpose(0, 1))
    return total_KGD.flatten(0, 1)


def _compute_weights(scores_KGT: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Returns the softmax over tokens; a sink takes part in it and has no value."""
    if sinks_H is None:
        return scores_KGT.softmax(dim=2)
    sinks = sinks_H.to(scores_KGT.dtype).view(*scores_KGT.shape[:2], 1)
    return torch.cat([scores_KGT, sinks], dim=2).softmax(dim=2)[..., :-1]
