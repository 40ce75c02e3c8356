"""Reads all of a packed file, compares it with its checksums and looks for weights that are NaN or Inf."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moesys.checkpoint.nonfinite import NonFinite, WeightCheck, count_nonfinite
from moesys.checkpoint.packed_file import open_packed_file
from moesys.checkpoint.packed_reading import ReadJob, read_sections
from moesys.checkpoint.read_progress import ReadProgress
from moesys.checkpoint.safetensors_file import view_bytes
from moesys.store import PartShape, Section


def check_packed(
    path: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> WeightCheck:
    """Reads every weight of a packed file, and its tokenizer and other small files; ``on_progress`` gets (bytes read,
    all bytes) of the weights.

    Of int8 weights the scales can be NaN or Inf. Memory: a few experts, or the largest other weights. Raises
    `ModelFormatError` for a file that does not fit or whose small files are damaged, `SectionReadError` for damaged
    weights.
    """
    found: list[NonFinite] = []
    with open_packed_file(path) as file:
        outline = file.make_outline()
        core, experts = file.find_core(outline), file.find_experts(outline)
        wanted = [
            (section, outline.layouts[layer_id].part_shapes)
            for (layer_id, _), section in experts.sections.items()
        ]
        wanted += [
            (core[name], (PartShape(tuple(weight.shape), weight.dtype),))
            for name, weight in outline.core.items()
        ]
        total = sum(section.num_bytes for section, _ in wanted)
        start = time.perf_counter()
        # For what it raises: a damaged tokenizer is found here and not when the model is to answer.
        file.read_files()
        read_sections(_list_jobs(wanted, found), ReadProgress(total, on_progress).add)
        return WeightCheck(tuple(found), len(wanted), total, time.perf_counter() - start)


def _list_jobs(
    wanted: Sequence[tuple[Section, Sequence[PartShape]]], found: list[NonFinite]
) -> Iterator[ReadJob]:
    for section, shapes in wanted:
        parts = [torch.empty(shape.shape, dtype=shape.dtype) for shape in shapes]
        yield ReadJob(section, tuple(map(view_bytes, parts)), _make_counter(section.name, parts, found))


def _make_counter(name: str, parts: Sequence[Tensor], found: list[NonFinite]) -> Callable[[], None]:
    def count() -> None:
        counts = [count_nonfinite(part) for part in parts]
        num_nan, num_inf = (sum(column) for column in zip(*counts, strict=True))
        if num_nan or num_inf:
            found.append(NonFinite(name, num_nan, num_inf))

    return count
