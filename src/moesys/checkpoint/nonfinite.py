"""Looks for NaN and Inf in the weights of a model folder. Knows dtypes and files; nothing of models.

Weights are streamed as they are stored, whatever the family, and never held: memory is a few pieces.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesys.checkpoint.model_files import FileTensor, Span, open_model_files
from moesys.checkpoint.read_progress import ReadProgress
from moesys.checkpoint.streaming import PIECE_BYTES, StagedPiece, stream

_BYTE_FORMATS = {
    torch.float8_e4m3fn: (0x7F, 0x7F, 0x7F),
    torch.float8_e5m2: (0x7F, 0x7C, 0x7D),
    torch.float8_e8m0fnu: (0xFF, 0xFF, 0xFF),
}
"""Of floats in one byte: the bits of the magnitude, the first magnitude that is Inf, and the first that is NaN."""

_BLOCKS_SUFFIX, _EXPONENTS_SUFFIX = "_blocks", "_scales"


@dataclass(frozen=True)
class NonFinite:
    """A tensor that holds NaN or Inf."""

    name: str
    num_nan: int
    num_inf: int


@dataclass(frozen=True)
class WeightCheck:
    """What was looked at and found. ``seconds`` is the time for ``num_bytes`` of ``num_tensors`` tensors."""

    found: tuple[NonFinite, ...]
    num_tensors: int
    num_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.num_bytes / max(self.seconds, 1e-9)


def check_folder(
    folder: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> WeightCheck:
    """Reads every tensor of a folder and counts what is not finite; ``on_progress`` gets (bytes read, all bytes).

    Exponents of MXFP4 and E8M0 count as NaN where they say so. Tensors of integers have nothing to look for and are
    read all the same. Raises `ModelFormatError` for files that cannot be read.
    """
    counts: dict[str, list[int]] = {}
    with open_model_files(folder) as tensors:
        total = sum(tensor.span.num_bytes for tensor in tensors.values())

        def count_values(name: str, values: Tensor) -> None:
            num_nan, num_inf = count_nonfinite(values)
            if num_nan or num_inf:
                found = counts.setdefault(name, [0, 0])
                found[0] += num_nan
                found[1] += num_inf

        start = time.perf_counter()
        stream(_iterate_pieces(tensors, count_values), ReadProgress(total, on_progress).add)
        seconds = time.perf_counter() - start
        found = tuple(NonFinite(name, *counts[name]) for name in sorted(counts))
        return WeightCheck(found, len(tensors), total, seconds)


def count_nonfinite(values: Tensor) -> tuple[int, int]:
    """Returns how many elements of a tensor on the CPU are NaN and how many Inf; integers are neither."""
    if not values.dtype.is_floating_point or not values.numel():
        return 0, 0
    if values.dtype in _BYTE_FORMATS:
        mask, first_inf, first_nan = _BYTE_FORMATS[values.dtype]
        magnitudes = values.contiguous().view(torch.uint8) & mask
        if int(magnitudes.max()) < first_inf:
            return 0, 0
        num_nan = int((magnitudes >= first_nan).sum())
        return num_nan, int((magnitudes >= first_inf).sum()) - num_nan
    low, high = torch.aminmax(values)
    if math.isfinite(low) and math.isfinite(high):
        return 0, 0
    return int(values.isnan().sum()), int(values.isinf().sum())


def _iterate_pieces(
    tensors: Mapping[str, FileTensor], count_values: Callable[[str, Tensor], None]
) -> Iterator[StagedPiece]:
    ordered = sorted(tensors.items(), key=lambda item: (item[1].span.path, item[1].span.offset))
    for name, tensor in ordered:
        dtype = _find_dtype(name, tensor, tensors)

        def deliver(parts: tuple[Tensor, ...], name: str = name, dtype: torch.dtype = dtype) -> None:
            count_values(name, parts[0].view(dtype))

        for span in _cut(tensor.span):
            yield StagedPiece((span,), deliver)


def _find_dtype(name: str, tensor: FileTensor, tensors: Mapping[str, FileTensor]) -> torch.dtype:
    """Returns the dtype of a tensor; exponents of MXFP4 are stored as integers and are none."""
    blocks_name = name.removesuffix(_EXPONENTS_SUFFIX) + _BLOCKS_SUFFIX
    if name.endswith(_EXPONENTS_SUFFIX) and tensor.record.dtype == "U8" and blocks_name in tensors:
        return torch.float8_e8m0fnu
    return tensor.record.torch_dtype


def _cut(span: Span) -> Iterator[Span]:
    for start in range(0, span.num_bytes, PIECE_BYTES):
        yield span.cut(start, min(PIECE_BYTES, span.num_bytes - start))
