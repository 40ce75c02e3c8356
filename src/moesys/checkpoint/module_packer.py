"""The walk over a model that is packed: each module, or expert, is read, rounded where it is to be int8, and written.

Knows modules and parts; knows nothing of files' names or of how a folder stores a weight. It holds one expert or one
other module at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from moesys.checkpoint.packed_outline import PackedOutline, PackedTensor, name_expert
from moesys.checkpoint.packed_rounding import ErrorMeter, RoundingError, round_matrix
from moesys.checkpoint.packed_writer import PackedFileWriter
from moesys.checkpoint.parts import Part, Place, iterate_places
from moesys.checkpoint.weight_reader import WeightReader
from moesys.errors import ModelFormatError, ShapeError
from moesys.models import Decoder
from moesys.moe import ExpertBank
from moesys.moe.linear import QuantizedLinear
from moesys.moe.slot_layout import Int8Layout


@dataclass(frozen=True)
class PackedPart:
    """What was written of a part of a model.

    num_bytes:  in the file, padding of experts included.
    error:      of the weights that became int8; None where none did.
    """

    part: Part
    num_parameters: int
    num_bytes: int
    error: RoundingError | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_parameters


class ModulePacker:
    """Writes all weights of a model, once.

    model:    on the meta device, as `WeightReader` reads it.
    outline:  what the file shall hold. tensors: the same by name.
    """

    def __init__(
        self,
        model: Decoder,
        outline: PackedOutline,
        reader: WeightReader,
        writer: PackedFileWriter,
        tensors: Mapping[str, PackedTensor],
    ) -> None:
        self._model = model
        self._outline = outline
        self._reader = reader
        self._writer = writer
        self._tensors = tensors
        self._num_bytes = dict.fromkeys(Part, 0)
        self._meters = {part: ErrorMeter() for part in Part}

    def write_all(self) -> tuple[PackedPart, ...]:
        """Writes every weight and returns what was written of each part of the model.

        Raises `ModelFormatError` for NaN or Inf that int8 cannot hold, and what reading and writing raise.
        """
        names = {id(module): name for name, module in self._model.named_modules()}
        num_parameters = dict.fromkeys(Part, 0)
        for place, top in iterate_places(self._model):
            num_parameters[place.part] += sum(parameter.numel() for parameter in top.parameters())
            for module in top.modules():
                name = names[id(module)]
                try:
                    self._write_module(place, name, module)
                except ShapeError as error:
                    raise ModelFormatError(f"{name} cannot be packed as int8: {error}") from None
        return tuple(
            PackedPart(part, count, self._num_bytes[part], self._meters[part].measure())
            for part, count in num_parameters.items()
            if count
        )

    def _write_module(self, place: Place, name: str, module: nn.Module) -> None:
        twin = self._outline.model.get_submodule(name)
        if isinstance(module, ExpertBank):
            self._write_experts(place, module)
        elif isinstance(twin, QuantizedLinear):
            assert isinstance(module, nn.Linear)
            weight, *bias = self._reader.read([module.weight, *_list_present(module.bias)])
            rounded = round_matrix(weight, self._meters[place.part])
            self._write(place, f"{name}.values", [rounded.values])
            self._write(place, f"{name}.scales", [rounded.scales])
            for values in bias:
                self._write(place, f"{name}.bias", [values])
        else:
            own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            named = dict(own)
            for own_name, values in zip(named, self._reader.read(list(named.values())), strict=True):
                self._write(place, f"{name}.{own_name}", [values])

    def _write_experts(self, place: Place, bank: ExpertBank) -> None:
        assert place.layer_id is not None
        is_rounded = isinstance(self._outline.layouts[place.layer_id], Int8Layout)
        biases = _list_present(bank.gate_up_bias_EF, bank.down_bias_ED)
        for expert_id in range(bank.down_EDF.shape[0]):
            parts = self._reader.read_expert([bank.gate_up_EFD, bank.down_EDF, *biases], expert_id)
            if is_rounded:
                parts = self._round_expert(place, parts)
            self._write(place, name_expert((place.layer_id, expert_id)), parts)

    def _round_expert(self, place: Place, parts: Sequence[Tensor]) -> list[Tensor]:
        meter = self._meters[place.part]
        gate_up, down = (round_matrix(matrix, meter) for matrix in parts[:2])
        biases = [bias.to(torch.float32) for bias in parts[2:]]
        return [gate_up.values, gate_up.scales, down.values, down.scales, *biases]

    def _write(self, place: Place, name: str, parts: Sequence[Tensor]) -> None:
        self._writer.write(name, parts)
        self._num_bytes[place.part] += self._tensors[name].record.size_bytes


def _list_present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
