"""What a model folder holds, told from its headers and ``config.json``: no weight is read.

Knows files, families and parts; knows nothing of budgets. A folder that moesys cannot load still has an inventory: of
its files, and of as much of the model as is understood, with the reason why not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
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
from moesys.checkpoint.model_files import FileTensor, open_model_files
from moesys.checkpoint.parts import Part, Place, PlaceFinder, iterate_places
from moesys.checkpoint.quantization import Fp8Blocks, read_fp8_blocks
from moesys.checkpoint.tensor_source import Fp8Source, Mxfp4Source, TensorSource, find_source
from moesys.errors import ModelFormatError, MoesysError
from moesys.models import Decoder, DecoderConfig, Family, make_skeleton
from moesys.moe import MoEConfig, Router

_EMBEDDING_NAME = "model.embed_tokens.weight"
_HEAD_NAME = "lm_head.weight"
_FORMAT_NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8"}


@dataclass(frozen=True)
class PartSize:
    """How large a part is: its weights, their bytes in the files, and their bytes in memory once loaded."""

    num_parameters: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0

    def __add__(self, other: PartSize) -> PartSize:
        return PartSize(
            self.num_parameters + other.num_parameters,
            self.stored_bytes + other.stored_bytes,
            self.loaded_bytes + other.loaded_bytes,
        )

    def divide(self, count: int) -> PartSize:
        """Returns the size of each of ``count`` equal pieces."""
        return PartSize(self.num_parameters // count, self.stored_bytes // count, self.loaded_bytes // count)


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer; ``each`` is the size of one."""

    layer_id: int
    num_experts: int
    top_k: int
    each: PartSize


@dataclass(frozen=True)
class ModelInventory:
    """A model that moesys knows.

    loaded_dtype:  of the weights in memory; routers are float32 always.
    parts:         of the model, those that it does not have left out.
    formats:       bytes in the files by how numbers are stored, with the scales of quantised ones.
    unused_bytes:  of tensors that are not read, such as layers that predict further tokens.
    """

    family: Family
    config: DecoderConfig
    loaded_dtype: torch.dtype
    parts: Mapping[Part, PartSize]
    experts: tuple[LayerExperts, ...]
    formats: Mapping[str, int]
    unused_bytes: int

    @property
    def total(self) -> PartSize:
        return sum(self.parts.values(), PartSize())

    @property
    def num_active_parameters(self) -> int:
        """Weights that take part in a token: all but the experts that are not chosen."""
        idle = sum((e.num_experts - e.top_k) * e.each.num_parameters for e in self.experts)
        return self.total.num_parameters - idle


@dataclass(frozen=True)
class Inventory:
    """A model folder.

    stored_bytes:  of all tensors, in ``dtypes`` by what the headers call their dtype.
    model:         None where moesys does not know the family or cannot read the config.
    obstacle:      why moesys cannot load the folder; None where nothing in the headers speaks against it.
    """

    folder: Path
    model_type: str
    num_files: int
    num_tensors: int
    dtypes: Mapping[str, int]
    model: ModelInventory | None
    obstacle: str | None

    @property
    def stored_bytes(self) -> int:
        return sum(self.dtypes.values())


def read_inventory(folder: Path, dtype: torch.dtype | None = None) -> Inventory:
    """Reads the headers of a model folder.

    dtype: as which the model would be loaded; None for the checkpoint's own. Raises `ModelFormatError` where
    ``config.json`` or the files themselves cannot be read.
    """
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
            _divide_experts(model.config, place, size)
            for place, size in sizes.items()
            if place.part is Part.EXPERTS
        ),
        formats=dict(formats.most_common()),
        unused_bytes=sum(tensor.span.num_bytes for tensor in tensors.values()) - formats.total(),
    )


def _divide_experts(config: DecoderConfig, place: Place, size: PartSize) -> LayerExperts:
    assert place.layer_id is not None
    layer = config.feed_forwards[place.layer_id]
    assert isinstance(layer, MoEConfig)
    return LayerExperts(place.layer_id, layer.num_experts, layer.top_k, size.divide(layer.num_experts))


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
            dtype = next(iter(source.tensors.values())).record.dtype
            return _FORMAT_NAMES.get(dtype, dtype.lower())
