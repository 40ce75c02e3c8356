"""The weights of a model folder read one at a time, an expert at a time where there are experts, into fresh memory.

Knows `UnreadModel` and where its tensors come from; does not know what becomes of them. The idea: a source says by
strides of which parameter it is a part, so the same source fills a parameter, or the memory of a single expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.checkpoint.expert_sections import find_base, list_banks
from moesys.checkpoint.hf import UnreadModel, cast_outline
from moesys.checkpoint.streaming import stream
from moesys.checkpoint.tensor_source import TensorSource


@dataclass(frozen=True)
class _Wanted:
    """Memory to fill: elements of a parameter from ``start`` on, and where they come from."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    sources: Sequence[TensorSource]


class WeightReader:
    """Reads the weights of a folder in any order. Memory: what is asked for, and some pieces on their way."""

    def __init__(self, unread: UnreadModel, on_progress: Callable[[int, int], None]) -> None:
        """Gives the unread model's weights their final dtypes, without memory. ``on_progress`` gets (bytes read, bytes
        to read), of the weights without their scales."""
        cast_outline(unread.model, unread.dtype)
        self._experts = {
            id(weight): weight for _, bank in list_banks(unread.model) for weight in bank.parameters()
        }
        self._sources: dict[tuple[int, int | None], list[TensorSource]] = {}
        self._on_progress = on_progress
        self._done = self._total = 0
        for source in unread.find_sources():
            self._sources.setdefault(self._find_key(source), []).append(source)
            self._total += next(iter(source.tensors.values())).span.num_bytes

    def read(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns the values of parameters and buffers of the model; those that no file holds are zeros."""
        return self._fill([_Wanted(w.shape, w.dtype, 0, self._find((id(w), None))) for w in weights])

    def read_expert(self, weights: Sequence[Tensor], expert_id: int) -> list[Tensor]:
        """Returns the part of one expert of each of its bank's weights."""
        wanted = []
        for weight in weights:
            shape = weight.shape[1:]
            of_all = [source.take(expert_id) for source in self._find((id(weight), None))]
            sources = [*self._find((id(weight), expert_id)), *of_all]
            wanted.append(_Wanted(shape, weight.dtype, expert_id * shape.numel(), sources))
        return self._fill(wanted)

    def _find(self, key: tuple[int, int | None]) -> list[TensorSource]:
        return self._sources.get(key, [])

    def _find_key(self, source: TensorSource) -> tuple[int, int | None]:
        """Returns the weight that a source is part of, and the expert where it holds no more than one."""
        view = source.stored.view
        base = find_base(view)
        if base not in self._experts:
            return base, None
        expert_size = self._experts[base].shape[1:].numel()
        if view.numel() > expert_size:
            return base, None
        return base, int(view.storage_offset()) // expert_size

    def _fill(self, wanted: Sequence[_Wanted]) -> list[Tensor]:
        filled, placed = [], []
        for want in wanted:
            make = torch.empty if want.sources else torch.zeros
            memory = make(want.shape, dtype=want.dtype)
            placed += [source.place(source.stored.place(memory, want.start)) for source in want.sources]
            filled.append(memory)
        stream((piece for source in placed for piece in source.iterate_pieces()), self._count)
        return filled

    def _count(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._on_progress(self._done, self._total)
