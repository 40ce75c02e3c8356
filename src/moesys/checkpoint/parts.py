"""The parts that a decoder's weights belong to, as people ask for them: embedding, attention, experts and so on.

Knows where modules stand in a `Decoder`; knows nothing of files. A view of a weight belongs to the part of the memory
that it looks at, so whatever a checkpoint splits or stacks needs no table of names here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, UntypedStorage, nn

from moesys.models import Decoder
from moesys.moe import MoELayer


class Part(StrEnum):
    """A part of a model, in the order of a table."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    DENSE = "dense_layers"
    SHARED = "shared_expert"
    ROUTER = "router"
    NORM = "norms"
    HEAD = "head"
    EXPERTS = "experts"


@dataclass(frozen=True)
class Place:
    """Where a weight stands: its part, and its layer where it has one."""

    part: Part
    layer_id: int | None = None


_IN_BLOCK = {"input_norm": Part.NORM, "post_mixer_norm": Part.NORM, "mixer": Part.ATTENTION}
_IN_MOE_LAYER = {
    "router": Part.ROUTER,
    "experts": Part.EXPERTS,
    "shared_expert": Part.SHARED,
    "shared_expert_gate": Part.SHARED,
    "residual": Part.DENSE,
}


def iterate_places(model: Decoder) -> Iterator[tuple[Place, nn.Module]]:
    """Yields modules that together hold every weight of the model, each once."""
    yield Place(Part.EMBEDDING), model.embedding
    for layer_id, block in enumerate(model.blocks):
        for name, child in block.named_children():
            if name in _IN_BLOCK:
                yield Place(_IN_BLOCK[name], layer_id), child
            elif isinstance(child, MoELayer):
                for inner_name, inner in child.named_children():
                    yield Place(_IN_MOE_LAYER[inner_name], layer_id), inner
            else:
                yield Place(Part.DENSE, layer_id), child
    yield Place(Part.NORM), model.final_norm
    if model.head is not None:
        yield Place(Part.HEAD), model.head


class PlaceFinder:
    """Tells the place of any view of a model's weights. Keeps the storages alive, so that each stays itself."""

    def __init__(self, model: Decoder) -> None:
        self._places: dict[int, tuple[Place, UntypedStorage]] = {}
        for place, module in iterate_places(model):
            for tensor in (*module.parameters(), *module.buffers()):
                storage = tensor.untyped_storage()
                self._places[id(storage)] = place, storage

    def find(self, view: Tensor) -> Place:
        """Returns the place of a weight or of a view of one; raises `KeyError` for another tensor."""
        return self._places[id(view.untyped_storage())][0]
