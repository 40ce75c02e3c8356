"""What tests of packed files share: a model rounded in memory, and one whose experts come from the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moesys.checkpoint.offloaded import open_weights
from moesys.checkpoint.packed_form import quantize_modules
from moesys.kernels import Int8Product
from moesys.models import Decoder, DocumentAttend
from moesys.moe import CachedLayer, CachedSource, Execution, LocalDispatcher, find_layers, quantize_bank
from moesys.moe.source import ExpertBank
from moesys.store import LeastRecent, SectionCache, SectionReader, SlotPool

NUM_TOKENS = 24


def compute_logits(model: Decoder, execution: Execution | None = None) -> Tensor:
    """Of a prompt of tokens from all over the vocabulary; in float32, which holds the model's exactly."""
    ids = torch.arange(NUM_TOKENS)[None] * 7 % model.config.vocab_size
    with torch.no_grad():
        output = model(ids, torch.arange(NUM_TOKENS)[None], DocumentAttend(None), execution)
        return model.compute_logits(output.hidden_BSD)[0].float()


def quantize_in_memory(model: Decoder, product: Int8Product = Int8Product.W8) -> Decoder:
    quantize_modules(model, product)
    for layer in find_layers(model).values():
        assert isinstance(layer.experts, ExpertBank)
        layer.experts = quantize_bank(layer.experts, product)
    return model


@contextmanager
def open_with_slots(
    path: Path, num_slots: int, product: Int8Product | None = None
) -> Iterator[tuple[Decoder, Execution, SectionCache]]:
    """A model of whose experts ``num_slots`` are in memory."""
    with open_weights(path, product) as weights, SectionReader() as reader:
        (layout,) = set(weights.experts.layouts.values())
        cache = SectionCache(
            SlotPool(num_slots, layout.part_shapes), weights.experts.sections, reader, LeastRecent()
        )
        model = weights.load_resident()
        layers = {
            layer_id: CachedLayer(cache, layer.router.num_experts, layout)
            for layer_id, layer in find_layers(model).items()
        }
        yield model, Execution(LocalDispatcher(), CachedSource(layers)), cache
