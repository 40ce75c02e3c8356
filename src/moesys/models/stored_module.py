"""Tensors that a checkpoint stores as we hold them: one by one, or all of a module."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from moesys.models.stored import StoredTensor


def store(name: str, view: Tensor) -> StoredTensor:
    """Returns the entry of a tensor that has the shape of its view."""
    return StoredTensor(name, tuple(view.shape), view)


def list_module(module: nn.Module, prefix: str) -> Iterator[StoredTensor]:
    """Yields every parameter of a module under its own name."""
    for name, parameter in module.named_parameters():
        yield store(f"{prefix}.{name}", parameter)
