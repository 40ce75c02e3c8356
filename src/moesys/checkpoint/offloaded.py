"""A model opened for running: what would be in memory, and what can stay on the disk.

One opening for both kinds that there are, model folders and packed files. Nothing but headers is read before somebody
asks for weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from moesys.checkpoint.expert_sections import ExpertSections, find_expert_sections, is_of_experts
from moesys.checkpoint.hf import UnreadModel, open_unread_model
from moesys.checkpoint.packed_file import is_packed_path
from moesys.checkpoint.packed_weights import open_packed
from moesys.errors import IneffectiveOptionError, ModelFormatError
from moesys.kernels import Int8Product
from moesys.models import Decoder, DecoderConfig
from moesys.moe import ExpertBank


class OffloadedWeights(Protocol):
    """What would be in memory and what stays on the disk. Nothing has been read but headers."""

    @property
    def experts(self) -> ExpertSections: ...

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def dtype(self) -> torch.dtype:
        """As which the model is computed."""
        ...

    @property
    def resident_bytes(self) -> int:
        """Of the weights that every token uses."""
        ...

    def load_resident(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Decoder:
        """Reads those weights and returns the model; its experts have no memory (the meta device).

        ``on_progress`` gets (bytes read, bytes to read).
        """
        ...


@contextmanager
def open_weights(path: Path, product: Int8Product | None = None) -> Iterator[OffloadedWeights]:
    """Looks at a model folder or a packed file and gives the sections of its experts; the rest can be loaded inside,
    once.

    product: how int8 weights are multiplied; None for ``w8``. The dtype is the one that `load_model` takes. Raises
    `ModelFormatError` for a model that does not fit, has no experts, or whose experts are not stored as the kernels
    take them, and `IneffectiveOptionError` for a product where no weight is int8.
    """
    opened = open_packed(path, product) if is_packed_path(path) else _open_folder(path, product)
    with opened as weights:
        if not weights.experts.sections:
            raise ModelFormatError(
                f"{path} has no experts that could stay on the disk: it runs with all its weights in memory, without "
                "--host-memory, and has nothing to verify"
            )
        yield weights


@dataclass(frozen=True)
class _FolderWeights:
    """See `OffloadedWeights`."""

    experts: ExpertSections
    _unread: UnreadModel

    @property
    def config(self) -> DecoderConfig:
        return self._unread.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self._unread.dtype

    @property
    def resident_bytes(self) -> int:
        return self._unread.count_bytes(_is_bank)

    def load_resident(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Decoder:
        """See `OffloadedWeights`."""
        return self._unread.load(_is_bank, on_progress)


@contextmanager
def _open_folder(folder: Path, product: Int8Product | None) -> Iterator[OffloadedWeights]:
    require_no_product(folder, product)
    with open_unread_model(folder) as unread:
        of_experts = [source for source in unread.find_sources() if is_of_experts(source, unread.model)]
        experts = find_expert_sections(unread.model, of_experts, unread.dtype)
        yield _FolderWeights(experts, unread)


def require_no_product(folder: Path, product: Int8Product | None) -> None:
    """Raises `IneffectiveOptionError` for a product that is chosen where weights are those of a model folder."""
    if product is not None:
        raise IneffectiveOptionError(
            f"product {product} has no effect on the folder {folder}, whose weights are floats; drop it, or pack the "
            "model: moesys pack MODEL --to FILE --dtype int8"
        )


def _is_bank(module: nn.Module) -> bool:
    return isinstance(module, ExpertBank)
