"""A model folder opened for running without its experts in memory: the rest can be loaded, experts stay on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moesys.checkpoint.expert_sections import ExpertSections, find_expert_sections, is_of_experts
from moesys.checkpoint.hf import UnreadModel, open_unread_model
from moesys.errors import ModelFormatError
from moesys.models import Decoder, DecoderConfig
from moesys.moe import ExpertBank


@dataclass(frozen=True)
class OffloadedWeights:
    """What would be in memory and what stays on the disk. Nothing has been read but headers."""

    experts: ExpertSections
    _unread: UnreadModel

    @property
    def config(self) -> DecoderConfig:
        return self._unread.model.config

    @property
    def dtype(self) -> torch.dtype:
        """As which the model is computed."""
        return self._unread.dtype

    @property
    def resident_bytes(self) -> int:
        """Of the weights that every token uses."""
        return self._unread.count_bytes(_is_bank)

    def load_resident(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Decoder:
        """Reads those weights and returns the model; its experts have no memory (the meta device).

        ``on_progress`` gets (bytes read, bytes to read).
        """
        return self._unread.load(_is_bank, on_progress)


@contextmanager
def open_offloaded(folder: Path) -> Iterator[OffloadedWeights]:
    """Looks at a folder and gives the sections of its experts; the rest can be loaded inside, once.

    The dtype is the one that `load_model` takes. Raises `ModelFormatError` for a folder that does not fit, has no
    experts, or whose experts are not stored as the kernels take them.
    """
    with open_unread_model(folder) as unread:
        of_experts = [source for source in unread.find_sources() if is_of_experts(source, unread.model)]
        if not of_experts:
            raise ModelFormatError(
                f"{folder} has no experts that could stay on the disk; run it without --host-memory"
            )
        experts = find_expert_sections(unread.model, of_experts, unread.family, unread.dtype)
        yield OffloadedWeights(experts, unread)


def _is_bank(module: nn.Module) -> bool:
    return isinstance(module, ExpertBank)
