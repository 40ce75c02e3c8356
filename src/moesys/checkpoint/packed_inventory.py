"""What a packed file holds, told from its header: sizes as they are stored and as they are in memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from moesys.checkpoint.inventory_records import (
    Inventory,
    ModelInventory,
    PartSize,
    divide_experts,
    name_format,
)
from moesys.checkpoint.packed_file import PackedFile, open_packed_file
from moesys.checkpoint.packed_outline import PackedTensor
from moesys.checkpoint.packed_weights import require_dtype
from moesys.checkpoint.parts import Part, Place, iterate_places
from moesys.checkpoint.safetensors_header import TensorRecord
from moesys.errors import MoesysError
from moesys.models import make_skeleton
from moesys.moe import ExpertBank, SlotLayout
from moesys.moe.linear import QuantizedLinear


def read_packed_inventory(path: Path, dtype: torch.dtype | None = None) -> Inventory:
    """Reads the header of a packed file. See `moesys.checkpoint.inventory.read_inventory`."""
    with open_packed_file(path) as file:
        dtypes: Counter[str] = Counter()
        for record in file.header.tensors.values():
            dtypes[record.dtype] += record.size_bytes
        model, obstacle = _read_model(file)
        if dtype is not None and model is not None:
            require_dtype(path, dtype, model.loaded_dtype)
        return Inventory(
            folder=path,
            model_type=str(file.header.config.get("model_type", "")),
            num_files=1,
            num_tensors=len(file.header.tensors),
            dtypes=dict(dtypes.most_common()),
            model=model,
            obstacle=obstacle,
        )


def _read_model(file: PackedFile) -> tuple[ModelInventory | None, str | None]:
    try:
        return _measure(file), None
    except MoesysError as error:
        return None, str(error)


def _measure(file: PackedFile) -> ModelInventory:
    outline = file.make_outline()
    config = outline.model.config
    sizes: defaultdict[Place, PartSize] = defaultdict(PartSize)
    formats: Counter[str] = Counter()
    for place, top in iterate_places(make_skeleton(config)):
        sizes[place] += PartSize(num_parameters=sum(parameter.numel() for parameter in top.parameters()))
    for place, top in iterate_places(outline.model):
        layout = None if place.layer_id is None else outline.layouts.get(place.layer_id)
        for module in top.modules():
            for name, size in _measure_weights(module, layout):
                sizes[place] += size
                formats[name] += size.stored_bytes
    parts = {part: sum((sizes[p] for p in sizes if p.part is part), PartSize()) for part in Part}
    return ModelInventory(
        family=file.family,
        config=config,
        loaded_dtype=file.dtype,
        parts={part: size for part, size in parts.items() if size.num_parameters},
        experts=tuple(
            divide_experts(config, place, size) for place, size in sizes.items() if place.part is Part.EXPERTS
        ),
        formats=dict(formats.most_common()),
        unused_bytes=0,
    )


def _measure_weights(module: nn.Module, layout: SlotLayout | None) -> Iterator[tuple[str, PartSize]]:
    """Yields the format and size of each of a module's own weights; all experts of a bank are one."""
    if isinstance(module, ExpertBank):
        assert layout is not None
        num_experts, extent = module.down_EDF.shape[0], PackedTensor.expert(layout)
        stored, loaded = extent.record.size_bytes, sum(part.num_bytes for part in extent.parts)
        yield (
            _name_dtype(layout.part_shapes[0].dtype),
            PartSize(0, num_experts * stored, num_experts * loaded),
        )
        return
    is_rounded = isinstance(module, QuantizedLinear)
    for name, weight in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        dtype = torch.int8 if is_rounded and name != "bias" else weight.dtype
        yield _name_dtype(dtype), PartSize(0, weight.nbytes, weight.nbytes)


def _name_dtype(dtype: torch.dtype) -> str:
    return name_format(TensorRecord.of(torch.empty(0, dtype=dtype)).dtype)
