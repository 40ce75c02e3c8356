"""Where each expert of a model folder lies on the disk, as sections that are read into slots byte for byte.

That works where the file holds an expert's numbers in the order and dtype that the kernels take: nothing is decoded on
the way. Other checkpoints are exported into such a layout first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.checkpoint.model_files import FileTensor
from moesys.checkpoint.tensor_source import PlainSource, TensorSource
from moesys.errors import ModelFormatError
from moesys.models import Block, Decoder
from moesys.moe import ExpertBank, ExpertKey, MoELayer
from moesys.store import Extent, PartShape, Section


@dataclass(frozen=True)
class ExpertSections:
    """The experts of a model on the disk.

    sections:  by layer and expert.
    shapes:    of the parts of a slot, by layer: gate_up and down, then both biases where there are any.
    """

    sections: dict[ExpertKey, Section]
    shapes: dict[int, tuple[PartShape, ...]]


def is_of_experts(source: TensorSource, model: Decoder) -> bool:
    """Whether a tensor of the checkpoint is part of a bank of experts."""
    return _find_base(source.stored.view) in _list_parameters(model)


def find_expert_sections(model: Decoder, sources: Iterable[TensorSource]) -> ExpertSections:
    """Returns the sections of a model that was built on the meta device, in the dtype of its files.

    Raises `ModelFormatError` for experts that the files hold in another order or format, or in several dtypes.
    """
    places = _list_parameters(model)
    extents: dict[ExpertKey, list[Extent]] = {}
    dtypes: set[torch.dtype] = set()
    for source in sources:
        layer_id, part, parameter = places[_find_base(source.stored.view)]
        if not isinstance(source, PlainSource) or not source.stored.view.is_contiguous():
            raise ModelFormatError(
                f"{source.stored.name} is not stored as the kernels take it, so that experts cannot be read one by one "
                "from this checkpoint; export it first: moesys export MODEL --to DIR --dtype bf16"
            )
        dtypes.add(source.values.record.torch_dtype)
        for expert_id, extent in _cut(source.values, source.stored.view, parameter, part):
            extents.setdefault((layer_id, expert_id), []).append(extent)
    if len(dtypes) != 1:
        raise ModelFormatError(
            f"the experts must be stored in one dtype, these are in {sorted(map(str, dtypes))}; export the model "
            "first: moesys export MODEL --to DIR --dtype bf16"
        )
    (dtype,) = dtypes
    shapes: dict[int, list[PartShape]] = {}
    for layer_id, _, parameter in places.values():
        shapes.setdefault(layer_id, []).append(PartShape(tuple(parameter.shape[1:]), dtype))
    return ExpertSections(
        sections={
            key: Section(f"layer {key[0]}, expert {key[1]}", tuple(parts))
            for key, parts in sorted(extents.items())
        },
        shapes={layer_id: tuple(parts) for layer_id, parts in shapes.items()},
    )


def _list_parameters(model: Decoder) -> dict[int, tuple[int, int, Tensor]]:
    """Layer, part of a slot and tensor of each expert parameter, by its identity."""
    places: dict[int, tuple[int, int, Tensor]] = {}
    for layer_id, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if not isinstance(block.feed_forward, MoELayer):
            continue
        bank = block.feed_forward.experts
        assert isinstance(bank, ExpertBank)
        tensors = (bank.gate_up_EFD, bank.down_EDF, bank.gate_up_bias_EF, bank.down_bias_ED)
        for part, parameter in enumerate(tensor for tensor in tensors if tensor is not None):
            places[id(parameter)] = layer_id, part, parameter
    return places


def _find_base(view: Tensor) -> int:
    base = view._base
    return id(view if base is None else base)


def _cut(values: FileTensor, view: Tensor, parameter: Tensor, part: int) -> Iterator[tuple[int, Extent]]:
    """Yields the bytes of each expert that a tensor of the file holds, all or a part of one expert's matrix."""
    itemsize = values.record.torch_dtype.itemsize
    expert_bytes = math.prod(parameter.shape[1:]) * itemsize
    first = view.storage_offset() * itemsize
    for start in range(0, view.numel() * itemsize, expert_bytes):
        expert_id, offset = divmod(first + start, expert_bytes)
        num_bytes = min(expert_bytes, view.numel() * itemsize - start)
        span = values.span.cut(start, num_bytes)
        yield expert_id, Extent(span.path, span.offset, span.num_bytes, part, offset)
