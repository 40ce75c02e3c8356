"""What is known of a checkpoint without reading a weight: sizes by part and by format. Plain records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moesys.checkpoint.parts import Part, Place
from moesys.models import DecoderConfig, Family
from moesys.moe import MoEConfig

_FORMAT_NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "I8": "int8"}


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
    """A model folder or a packed file.

    stored_bytes:  of all tensors, in ``dtypes`` by what the headers call their dtype.
    model:         None where moesys does not know the family or cannot read the config.
    obstacle:      why moesys cannot load it; None where nothing in the headers speaks against it.
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


def divide_experts(config: DecoderConfig, place: Place, size: PartSize) -> LayerExperts:
    """Returns a layer's experts, all of which have the given size together."""
    assert place.layer_id is not None
    layer = config.feed_forwards[place.layer_id]
    assert isinstance(layer, MoEConfig)
    return LayerExperts(place.layer_id, layer.num_experts, layer.top_k, size.divide(layer.num_experts))


def name_format(dtype: str) -> str:
    """Returns what people call a dtype of safetensors, such as ``bf16`` for ``BF16``."""
    return _FORMAT_NAMES.get(dtype, dtype.lower())
