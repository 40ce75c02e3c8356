"""A packed file opened for running: all of it in memory, or all but its experts.

Knows sections and the modules that they fill; does not know what computes. Every byte is compared with its checksum on
the way in, and read a second time before it is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from moesys.checkpoint.expert_sections import ExpertSections, list_banks
from moesys.checkpoint.packed_file import PackedFile, open_packed_file
from moesys.checkpoint.packed_form import PackedForm
from moesys.checkpoint.packed_outline import PackedOutline
from moesys.checkpoint.packed_reading import ReadJob, read_sections
from moesys.checkpoint.read_progress import ReadProgress
from moesys.checkpoint.safetensors_file import view_bytes
from moesys.errors import IneffectiveOptionError, ModelFormatError
from moesys.kernels import Int8Product, Int8Weight
from moesys.models import Block, Decoder, DecoderConfig
from moesys.moe import ExpertBank, MoELayer, SlotLayout
from moesys.moe.source import make_quantized_bank
from moesys.store import SlotPool, allocate_weight


@dataclass(frozen=True)
class PackedWeights:
    """See `OffloadedWeights`. Nothing has been read but the header."""

    experts: ExpertSections
    _file: PackedFile
    _outline: PackedOutline

    @property
    def config(self) -> DecoderConfig:
        return self._outline.model.config

    @property
    def dtype(self) -> torch.dtype:
        """As which the model is computed, but for int8 experts, which are computed in float32."""
        return self._file.dtype

    @property
    def resident_bytes(self) -> int:
        """Of the weights that every token uses."""
        return sum(tensor.nbytes for tensor in self._outline.core.values())

    def load_resident(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Decoder:
        """See `OffloadedWeights`. Raises `SectionReadError` for weights that cannot be read or are damaged."""
        _read_all(self._allocate_core(), on_progress)
        return self._finish()

    def load_all(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Decoder:
        """Reads all weights and returns the model, for inference. ``on_progress`` and errors as `load_resident`."""
        jobs = list(chain(self._allocate_core(), self._allocate_experts()))
        _read_all(jobs, on_progress)
        return self._finish()

    def _allocate_core(self) -> list[ReadJob]:
        sections = self._file.find_core(self._outline)
        modules = dict(self._outline.model.named_modules())
        jobs = []
        for name, tensor in self._outline.core.items():
            memory = allocate_weight(tuple(tensor.shape), tensor.dtype)
            owner, _, own_name = name.rpartition(".")
            is_parameter = isinstance(tensor, nn.Parameter)
            value = nn.Parameter(memory, requires_grad=False) if is_parameter else memory
            setattr(modules[owner], own_name, value)
            jobs.append(ReadJob(sections[name], (view_bytes(memory),)))
        return jobs

    def _allocate_experts(self) -> Iterator[ReadJob]:
        for layer_id, bank in list_banks(self._outline.model):
            layout = self._outline.layouts[layer_id]
            num_experts = bank.down_EDF.shape[0]
            pool = SlotPool(num_experts, layout.part_shapes)
            _install(self._outline.model, layer_id, layout, pool.parts)
            for expert_id in range(num_experts):
                section = self.experts.sections[layer_id, expert_id]
                buffers = [
                    pool.open_part(expert_id, extent.part, extent.part_offset, extent.num_bytes)
                    for extent in section.extents
                ]
                yield ReadJob(section, tuple(buffers))

    def _finish(self) -> Decoder:
        return self._outline.model.eval().requires_grad_(False)


@contextmanager
def open_packed(path: Path, product: Int8Product | None = None) -> Iterator[PackedWeights]:
    """Looks at a packed file; its weights can be loaded inside, once.

    product: how int8 weights are multiplied; None for ``w8``. Raises `ModelFormatError` for a file that is damaged or
    none, and `IneffectiveOptionError` for a product where no weight is int8.
    """
    with open_packed_file(path) as file:
        if product is not None and file.header.form is not PackedForm.INT8:
            raise IneffectiveOptionError(
                f"product {product} has no effect on {path}, which holds no int8 weights; drop it, or pack the model "
                "with --dtype int8"
            )
        outline = file.make_outline(product or Int8Product.W8)
        yield PackedWeights(file.find_experts(outline), file, outline)


def require_dtype(path: Path, asked: torch.dtype, found: torch.dtype) -> None:
    """Raises `ModelFormatError` where a packed file is asked for in another dtype than it was packed in."""
    if asked != found:
        raise ModelFormatError(
            f"{path} was packed to be computed in {found}, not in {asked}; drop the dtype, or pack the model again as "
            "another one"
        )


def _install(model: Decoder, layer_id: int, layout: SlotLayout, parts: Sequence[Tensor]) -> None:
    """Puts a layer's experts into the model: those of a pool that has a slot for each."""
    block = model.blocks[layer_id]
    assert isinstance(block, Block)
    assert isinstance(block.feed_forward, MoELayer)
    view = layout.make_view(parts, None)
    if isinstance(view.gate_up_SFD, Int8Weight):
        block.feed_forward.experts = make_quantized_bank(view)
        return
    bank = block.feed_forward.experts
    assert isinstance(bank, ExpertBank)
    for (name, _), part in zip(list(bank.named_parameters()), parts, strict=True):
        setattr(bank, name, nn.Parameter(part, requires_grad=False))


def _read_all(jobs: Sequence[ReadJob], on_progress: Callable[[int, int], None]) -> None:
    total = sum(job.section.num_bytes for job in jobs)
    read_sections(jobs, ReadProgress(total, on_progress).add)
