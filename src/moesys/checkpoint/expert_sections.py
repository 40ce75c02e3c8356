"""Where each expert of a model folder lies on the disk, as sections that are read into slots byte for byte.

That works where the file holds an expert's numbers in the order and dtype that the kernels take: nothing is decoded on
the way. Other checkpoints are packed first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesys.checkpoint.model_files import FileTensor
from moesys.checkpoint.tensor_source import Fp8Source, Mxfp4Source, PlainSource, TensorSource
from moesys.errors import ModelFormatError
from moesys.models import Block, Decoder, Encoding, StoredTensor
from moesys.moe import ExpertBank, ExpertKey, MoELayer, PlainLayout, SlotLayout
from moesys.store import Extent, Section, StoredFile

_PACK = "moesys pack MODEL --to FILE"


@dataclass(frozen=True)
class ExpertSections:
    """The experts of a model on the disk.

    sections:  by layer and expert.
    layouts:   what a slot for them holds, by layer.
    """

    sections: dict[ExpertKey, Section]
    layouts: dict[int, SlotLayout]


def is_of_experts(source: TensorSource, model: Decoder) -> bool:
    """Whether a tensor of the checkpoint is part of a bank of experts."""
    return find_base(source.stored.view) in _list_parameters(model)


def find_expert_sections(
    model: Decoder, sources: Iterable[TensorSource], dtype: torch.dtype
) -> ExpertSections:
    """Returns the sections of a model on the meta device; nothing but the files' identity is read.

    dtype: as which the model is computed.

    Raises `ModelFormatError` for experts that the files hold in another order, format or dtype.
    """
    places = _list_parameters(model)
    extents: dict[ExpertKey, list[Extent]] = {}
    files: dict[Path, StoredFile] = {}
    for source in sources:
        layer_id, part, parameter = places[find_base(source.stored.view)]
        values = _require_plain(source)
        if values.record.torch_dtype != dtype:
            raise ModelFormatError(
                f"{source.stored.name} is stored as {values.record.dtype} and the model is computed in {dtype}, as "
                "config.json or the lack of a kernel has it, but experts are read from the disk as they are; pack "
                f"the model first: {_PACK} --dtype {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
            )
        path = values.span.path
        if path not in files:
            files[path] = StoredFile.identify(path, values.span.descriptor)
        for expert_id, extent in _cut(values, source.stored.view, parameter, part, files[path]):
            extents.setdefault((layer_id, expert_id), []).append(extent)
    return ExpertSections(
        sections={
            key: Section(f"layer {key[0]}, expert {key[1]}", tuple(parts))
            for key, parts in sorted(extents.items())
        },
        layouts={layer_id: make_plain_layout(bank, dtype) for layer_id, bank in list_banks(model)},
    )


def _require_plain(source: TensorSource) -> FileTensor:
    """Returns the tensor whose bytes are what the kernels take; raises `ModelFormatError` with what helps."""
    if isinstance(source, PlainSource) and _is_plain(source.stored):
        return source.values
    match source:
        case Fp8Source():
            how = "as FP8"
        case Mxfp4Source():
            how = "as MXFP4"
        case _:
            how = "in another order than the kernels take"
    raise ModelFormatError(
        f"{source.stored.name} is stored {how}, so that experts cannot be read one by one from this checkpoint; pack "
        f"the model first: {_PACK}"
    )


def _is_plain(stored: StoredTensor) -> bool:
    return stored.encoding is Encoding.PLAIN and stored.view.is_contiguous()


def _list_parameters(model: Decoder) -> dict[int, tuple[int, int, Tensor]]:
    """Layer, part of a slot and tensor of each expert parameter, by its identity."""
    places: dict[int, tuple[int, int, Tensor]] = {}
    for layer_id, bank in list_banks(model):
        tensors = (bank.gate_up_EFD, bank.down_EDF, bank.gate_up_bias_EF, bank.down_bias_ED)
        for part, parameter in enumerate(tensor for tensor in tensors if tensor is not None):
            places[id(parameter)] = layer_id, part, parameter
    return places


def list_banks(model: Decoder) -> Iterator[tuple[int, ExpertBank]]:
    """Yields the experts of each MoE layer, with the layer's number."""
    for layer_id, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if isinstance(block.feed_forward, MoELayer):
            assert isinstance(block.feed_forward.experts, ExpertBank)
            yield layer_id, block.feed_forward.experts


def make_plain_layout(bank: ExpertBank, dtype: torch.dtype) -> PlainLayout:
    """Returns what a slot holds for an expert of a bank that is stored as ``dtype``."""
    _, hidden_size, inner_size = bank.down_EDF.shape
    return PlainLayout(hidden_size, inner_size, dtype, bank.form, bank.down_bias_ED is not None)


def find_base(view: Tensor) -> int:
    """Returns the identity of the parameter that a tensor is, or is a view of."""
    base = view._base
    return id(view if base is None else base)


def _cut(
    values: FileTensor, view: Tensor, parameter: Tensor, part: int, file: StoredFile
) -> Iterator[tuple[int, Extent]]:
    """Yields the bytes of each expert that a tensor of the file holds, all or a part of one expert's matrix."""
    itemsize = values.record.torch_dtype.itemsize
    expert_bytes = math.prod(parameter.shape[1:]) * itemsize
    first = int(view.storage_offset()) * itemsize
    for start in range(0, view.numel() * itemsize, expert_bytes):
        expert_id, offset = divmod(first + start, expert_bytes)
        num_bytes = min(expert_bytes, view.numel() * itemsize - start)
        span = values.span.cut(start, num_bytes)
        yield expert_id, Extent(file, span.offset, span.num_bytes, part, offset)
