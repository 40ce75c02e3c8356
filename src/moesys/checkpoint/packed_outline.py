"""What a packed file of a model holds: every tensor and its parts, told from the config alone.

Writer and reader share it, so that a reader knows what to expect before it believes a header. Knows names, shapes and
alignment; knows nothing of bytes on a disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn

from moesys.checkpoint.expert_sections import list_banks, make_plain_layout
from moesys.checkpoint.hf import cast_outline
from moesys.checkpoint.packed_form import PackedForm, quantize_modules
from moesys.checkpoint.safetensors_header import TensorRecord
from moesys.kernels import Int8Product
from moesys.models import Decoder, DecoderConfig, make_skeleton
from moesys.moe import ExpertBank, ExpertKey, SlotLayout
from moesys.moe.slot_layout import Int8Layout

EXTENT_ALIGNMENT = 4096
"""Of an expert in the file, in bytes: a page, which direct reads ask for."""

PART_ALIGNMENT = 64
"""Of a part within an expert: a cache line."""

EXPERTS_PREFIX = "experts/"
"""What the extents of experts begin with."""

FILES_PREFIX = "files/"
"""What tensors that are small files of the model folder begin with."""


@dataclass(frozen=True)
class PartPlace:
    """Bytes of a tensor with a checksum of their own."""

    offset: int
    num_bytes: int


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of a packed file. ``parts`` leave out what only pads."""

    record: TensorRecord
    parts: tuple[PartPlace, ...]

    @classmethod
    def whole(cls, record: TensorRecord) -> Self:
        """Returns a tensor of one part."""
        return cls(record, (PartPlace(0, record.size_bytes),))

    @classmethod
    def expert(cls, layout: SlotLayout) -> Self:
        """Returns the extent of one expert: its parts in the order of the slot's, padded to whole pages."""
        parts, end = [], 0
        for shape in layout.part_shapes:
            start = _round_up(end, PART_ALIGNMENT)
            parts.append(PartPlace(start, shape.num_bytes))
            end = start + shape.num_bytes
        return cls(TensorRecord("U8", (_round_up(end, EXTENT_ALIGNMENT),)), tuple(parts))


@dataclass(frozen=True)
class PackedOutline:
    """The model of a packed file.

    model:    on the meta device, in the dtypes that it is computed in, its dense matrices in the file's form. Experts
              are banks of the dtype that they take rows in, whatever their form.
    layouts:  what a slot for an expert holds, by layer.
    """

    model: Decoder
    layouts: dict[int, SlotLayout]

    @cached_property
    def core(self) -> dict[str, Tensor]:
        """All weights but the experts', by name, wide dtypes first."""
        model = self.model
        of_experts = {id(parameter) for _, bank in list_banks(model) for parameter in bank.parameters()}
        named = chain(model.named_parameters(), model.named_buffers())
        core = [(name, tensor) for name, tensor in named if id(tensor) not in of_experts]
        return dict(sorted(core, key=lambda item: item[1].itemsize, reverse=True))

    @cached_property
    def expert_keys(self) -> tuple[ExpertKey, ...]:
        """Of all experts, in the order of the file."""
        return tuple(
            (layer_id, expert_id)
            for layer_id, bank in list_banks(self.model)
            for expert_id in range(bank.down_EDF.shape[0])
        )

    def list_tensors(self) -> Iterator[tuple[str, PackedTensor]]:
        """Yields what the file holds in its order, but for the small files at its end. Experts come first, so that
        their pages are the file's."""
        extents = {layer_id: PackedTensor.expert(layout) for layer_id, layout in self.layouts.items()}
        for key in self.expert_keys:
            yield name_expert(key), extents[key[0]]
        for name, tensor in self.core.items():
            yield name, PackedTensor.whole(TensorRecord.of(tensor))


def make_outline(
    config: DecoderConfig, dtype: torch.dtype, form: PackedForm, product: Int8Product = Int8Product.W8
) -> PackedOutline:
    """Returns what a packed file of a model holds. dtype: of what is not int8, routers excepted. Raises what `Decoder`
    raises."""
    model = make_skeleton(config)
    cast_outline(model, dtype)
    banks = dict(list_banks(model))
    if form is PackedForm.FLOAT:
        plain = {layer_id: make_plain_layout(bank, dtype) for layer_id, bank in banks.items()}
        return PackedOutline(model, dict(plain))
    layouts = {layer_id: _make_int8_layout(bank, product) for layer_id, bank in banks.items()}
    quantize_modules(model, product)
    for bank in banks.values():
        _cast(bank, torch.float32)
    return PackedOutline(model, dict(layouts))


def name_expert(key: ExpertKey) -> str:
    """Returns what the extent of an expert is called in the file."""
    layer_id, expert_id = key
    return f"{EXPERTS_PREFIX}{layer_id}/{expert_id}"


def list_files(files: Iterable[tuple[str, int]]) -> Iterator[tuple[str, PackedTensor]]:
    """Yields the tensors of small files, given by name and size."""
    for name, num_bytes in files:
        yield FILES_PREFIX + name, PackedTensor.whole(TensorRecord("U8", (num_bytes,)))


def _make_int8_layout(bank: ExpertBank, product: Int8Product) -> Int8Layout:
    _, hidden_size, inner_size = bank.down_EDF.shape
    return Int8Layout(hidden_size, inner_size, bank.form, bank.down_bias_ED is not None, product)


def _cast(bank: ExpertBank, dtype: torch.dtype) -> None:
    for name, parameter in list(bank.named_parameters()):
        setattr(bank, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def _round_up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
