"""A model folder opened for running without its experts in memory: the rest is loaded, experts stay on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moesys.checkpoint import hf
from moesys.checkpoint.expert_sections import ExpertSections, find_expert_sections, is_of_experts
from moesys.checkpoint.model_files import open_model_files
from moesys.checkpoint.quantization import read_fp8_blocks
from moesys.checkpoint.weight_memory import allocate_weight
from moesys.errors import ModelFormatError
from moesys.models import Decoder
from moesys.moe import ExpertBank, Router


@dataclass(frozen=True)
class OffloadedWeights:
    """What is in memory and what stays on the disk.

    model:           everything but the experts, whose parameters have no memory (the meta device).
    resident_bytes:  of its weights.
    """

    model: Decoder
    experts: ExpertSections
    resident_bytes: int


@contextmanager
def open_offloaded(folder: Path) -> Iterator[OffloadedWeights]:
    """Loads all but the experts, in the dtype of the files, and gives their sections.

    Raises `ModelFormatError` for a folder that does not fit, has no experts, or whose experts are not stored as the
    kernels take them.
    """
    keys = hf.read_config_file(folder)
    family, fp8 = hf.find_family(keys), read_fp8_blocks(keys)
    with open_model_files(folder) as tensors:
        config, tensors = hf.resolve_head(
            hf.read_decoder_config(folder / "config.json", family, keys), tensors
        )
        model = hf.build_on_meta(folder, family, config, tensors)
        sources = hf.find_sources(folder, family, model, tensors, fp8)
        of_experts = [source for source in sources if is_of_experts(source, model)]
        if not of_experts:
            raise ModelFormatError(f"{folder} has no experts that could stay on the disk; load it as a whole")
        experts = find_expert_sections(model, of_experts)
        (dtype,) = {shape.dtype for shapes in experts.shapes.values() for shape in shapes}
        _materialise_resident(model, dtype)
        sources = hf.find_sources(folder, family, model, tensors, fp8)
        hf.stream_sources(
            [source for source in sources if not is_of_experts(source, model)], lambda done, total: None
        )
        resident = [p for p in (*model.parameters(), *model.buffers()) if p.device.type != "meta"]
        yield OffloadedWeights(
            model.eval().requires_grad_(False), experts, sum(p.numel() * p.itemsize for p in resident)
        )


def _materialise_resident(model: Decoder, dtype: torch.dtype) -> None:
    """Gives memory to all but the experts."""
    for module in model.modules():
        if isinstance(module, ExpertBank):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            kept = parameter.dtype if isinstance(module, Router) else dtype
            memory = allocate_weight(tuple(parameter.shape), kept)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
