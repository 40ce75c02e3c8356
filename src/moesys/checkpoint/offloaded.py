"""A model folder opened for running without its experts in memory: the rest can be loaded, experts stay on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moesys.checkpoint import hf
from moesys.checkpoint.expert_sections import ExpertSections, find_expert_sections, is_of_experts
from moesys.checkpoint.model_files import open_model_files
from moesys.checkpoint.quantization import read_fp8_blocks
from moesys.errors import ModelFormatError
from moesys.models import Decoder, DecoderConfig
from moesys.moe import ExpertBank, Router
from moesys.store import allocate_weight


@dataclass(frozen=True)
class OffloadedWeights:
    """What would be in memory and what stays on the disk. Nothing has been read but headers.

    dtype:           as which the model is computed.
    resident_bytes:  of the weights that every token uses.
    load_resident:   reads those and returns the model; its experts have no memory (the meta device).
    """

    config: DecoderConfig
    dtype: torch.dtype
    experts: ExpertSections
    resident_bytes: int
    load_resident: Callable[[], Decoder]


@contextmanager
def open_offloaded(folder: Path) -> Iterator[OffloadedWeights]:
    """Looks at a folder and gives the sections of its experts; the rest can be loaded inside, once.

    The dtype is the one that `load_model` takes. Raises `ModelFormatError` for a folder that does not fit, has no
    experts, or whose experts are not stored as the kernels take them.
    """
    keys = hf.read_config_file(folder)
    family, fp8, dtype = hf.find_family(keys), read_fp8_blocks(keys), hf.read_dtype(keys)
    with open_model_files(folder) as tensors:
        hf.check_num_layers(keys, tensors)
        config, tensors = hf.resolve_head(
            hf.read_decoder_config(folder / "config.json", family, keys), tensors
        )
        model = hf.build_on_meta(folder, family, config, tensors)
        sources = hf.find_sources(folder, family, model, tensors, fp8)
        of_experts = [source for source in sources if is_of_experts(source, model)]
        if not of_experts:
            raise ModelFormatError(
                f"{folder} has no experts that could stay on the disk; run it without --host-memory"
            )
        experts = find_expert_sections(model, of_experts, family, dtype)

        def load_resident() -> Decoder:
            _materialise_resident(model, dtype)
            sources = hf.find_sources(folder, family, model, tensors, fp8)
            hf.stream_sources(
                [source for source in sources if not is_of_experts(source, model)], lambda done, total: None
            )
            return model.eval().requires_grad_(False)

        yield OffloadedWeights(config, dtype, experts, _count_resident_bytes(model, dtype), load_resident)


def _count_resident_bytes(model: Decoder, dtype: torch.dtype) -> int:
    return sum(
        sum(p.numel() * _choose_dtype(module, p, dtype).itemsize for p in module.parameters(recurse=False))
        + sum(b.numel() * b.itemsize for b in module.buffers(recurse=False))
        for module in model.modules()
        if not isinstance(module, ExpertBank)
    )


def _choose_dtype(module: nn.Module, parameter: nn.Parameter, dtype: torch.dtype) -> torch.dtype:
    return parameter.dtype if isinstance(module, Router) else dtype


def _materialise_resident(model: Decoder, dtype: torch.dtype) -> None:
    """Gives memory to all but the experts."""
    for module in model.modules():
        if isinstance(module, ExpertBank):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            memory = allocate_weight(tuple(parameter.shape), _choose_dtype(module, parameter, dtype))
            setattr(module, name, nn.Parameter(memory, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
