"""What a model folder or a packed file holds, told from headers and config: no weight is read.

Knows files, families and parts; knows nothing of budgets. A folder that moesys cannot load still has an inventory: of
its files, and of as much of the model as is understood, with the reason why not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesys.checkpoint.hf import (
    check_num_layers,
    find_family,
    find_sources,
    read_config_file,
    read_decoder_config,
    read_dtype,
    refusing_odd_sizes,
)
from moesys.checkpoint.inventory_records import (
    Inventory,
    ModelInventory,
    PartSize,
    divide_experts,
    name_format,
)
from moesys.checkpoint.model_files import FileTensor, open_model_files
from moesys.checkpoint.packed_file import is_packed_path
from moesys.checkpoint.packed_inventory import read_packed_inventory
from moesys.checkpoint.parts import Part, Place, PlaceFinder, iterate_places
from moesys.checkpoint.quantization import Fp8Blocks, read_fp8_blocks
from moesys.checkpoint.tensor_source import Fp8Source, Mxfp4Source, TensorSource, find_source
from moesys.errors import ModelFormatError, MoesysError
from moesys.models import Decoder, DecoderConfig, Family, make_skeleton
from moesys.moe import Router

_EMBEDDING_NAME = "model.embed_tokens.weight"
_HEAD_NAME = "lm_head.weight"


def read_inventory(path: Path, dtype: torch.dtype | None = None) -> Inventory:
    """Reads the headers of a model folder or of a packed file.

    dtype: as which the model would be loaded; None for the checkpoint's own. Raises `ModelFormatError` where
    ``config.json`` or the files themselves cannot be read, and for a dtype that a packed file does not have.
    """
    return read_packed_inventory(path, dtype) if is_packed_path(path) else _read_folder(path, dtype)


def _read_folder(folder: Path, dtype: torch.dtype | None) -> Inventory:
    keys = read_config_file(folder)
    with open_model_files(folder) as tensors:
        dtypes: Counter[str] = Counter()
        for tensor in tensors.values():
            dtypes[tensor.record.dtype] += tensor.span.num_bytes
        model, obstacle = _read_model(folder, keys, tensors, dtype)
        return Inventory(
            folder=folder,
            model_type=str(keys.get("model_type", "")),
            num_files=len({tensor.span.path for tensor in tensors.values()}),
            num_tensors=len(tensors),
            dtypes=dict(dtypes.most_common()),
            model=model,
            obstacle=obstacle,
        )


def _read_model(
    folder: Path, keys: Mapping[str, Any], tensors: Mapping[str, FileTensor], dtype: torch.dtype | None
) -> tuple[ModelInventory | None, str | None]:
    try:
        family = find_family(keys)
        fp8 = read_fp8_blocks(keys)
        check_num_layers(keys, tensors)
        config = read_decoder_config(folder / "config.json", family, keys)
        loaded_dtype = dtype or read_dtype(keys)
        with refusing_odd_sizes(folder):
            model = make_skeleton(config)
            used = _follow_tied_head(config, tensors)
            sources, obstacle = _match(folder, family, model, used, fp8)
    except MoesysError as error:
        return None, str(error)
    return _measure(family, model, loaded_dtype, tensors, sources), obstacle


def _follow_tied_head(config: DecoderConfig, tensors: Mapping[str, FileTensor]) -> Mapping[str, FileTensor]:
    """Takes a head beside a tied embedding for a copy of it: whether it is one, only the weights could tell."""
    if not config.tie_embeddings or _HEAD_NAME not in tensors:
        return tensors
    others = {name: tensor for name, tensor in tensors.items() if name != _HEAD_NAME}
    return {_EMBEDDING_NAME: tensors[_HEAD_NAME], **others}


def _match(
    folder: Path, family: Family, model: Decoder, tensors: Mapping[str, FileTensor], fp8: Fp8Blocks | None
) -> tuple[list[TensorSource], str | None]:
    """Returns where the model's tensors are, and what is wrong where not every one is found."""
    try:
        return find_sources(folder, family, model, tensors, fp8), None
    except ModelFormatError as error:
        found = (find_source(stored, tensors, fp8) for stored in family.list_tensors(model, tensors.keys()))
        return [source for source in found if source is not None], str(error)


def _measure(
    family: Family,
    model: Decoder,
    dtype: torch.dtype,
    tensors: Mapping[str, FileTensor],
    sources: list[TensorSource],
) -> ModelInventory:
    sizes: defaultdict[Place, PartSize] = defaultdict(PartSize)
    for place, module in iterate_places(model):
        sizes[place] += PartSize(
            num_parameters=sum(parameter.numel() for parameter in module.parameters()),
            loaded_bytes=sum(_count_loaded_bytes(inner, dtype) for inner in module.modules()),
        )
    formats: Counter[str] = Counter()
    places = PlaceFinder(model)
    for source in sources:
        num_bytes = sum(tensor.span.num_bytes for tensor in source.tensors.values())
        sizes[places.find(source.stored.view)] += PartSize(stored_bytes=num_bytes)
        formats[_name_format(source)] += num_bytes
    parts = {part: sum((sizes[p] for p in sizes if p.part is part), PartSize()) for part in Part}
    return ModelInventory(
        family=family,
        config=model.config,
        loaded_dtype=dtype,
        parts={part: size for part, size in parts.items() if size.num_parameters},
        experts=tuple(
            divide_experts(model.config, place, size)
            for place, size in sizes.items()
            if place.part is Part.EXPERTS
        ),
        formats=dict(formats.most_common()),
        unused_bytes=sum(tensor.span.num_bytes for tensor in tensors.values()) - formats.total(),
    )


def _count_loaded_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Returns the bytes of a module's own weights once loaded: routers keep their dtype."""
    parameters = list(module.parameters(recurse=False))
    if not isinstance(module, Router):
        return sum(parameter.numel() * dtype.itemsize for parameter in parameters)
    return sum(weight.nbytes for weight in (*parameters, *module.buffers(recurse=False)))


def _name_format(source: TensorSource) -> str:
    match source:
        case Fp8Source():
            return "fp8"
        case Mxfp4Source():
            return "mxfp4"
        case _:
            return name_format(next(iter(source.tensors.values())).record.dtype)
