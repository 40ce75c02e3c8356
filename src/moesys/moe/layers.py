"""The MoE layers of a model by their id, which is the key of banks, biases and counts everywhere.

Knows modules; does not know which model they are part of.
"""

from __future__ import annotations

from torch import nn

from moesys.errors import RoutingError
from moesys.moe.layer import MoELayer
from moesys.moe.source import ResidentSource


def find_layers(model: nn.Module) -> dict[int, MoELayer]:
    """Returns the MoE layers in a model, itself included, by ``layer_id`` in the order of the modules.

    Raises `RoutingError` when two of them have the same id: a mapping would silently keep one and forget the other.
    """
    layers: dict[int, MoELayer] = {}
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, MoELayer):
            continue
        if (layer_id := module.layer_id) in layers:
            raise RoutingError(
                f"the MoE layers '{names[layer_id]}' and '{name}' both have layer_id {layer_id}, so that one would get "
                "the other's experts, balance bias and counts; make each with a layer_id of its own"
            )
        layers[layer_id], names[layer_id] = module, name
    return layers


def make_resident_source(model: nn.Module) -> ResidentSource:
    """Makes the source of all experts of a model where they lie. Raises `RoutingError` as `find_layers` does."""
    return ResidentSource({layer_id: layer.experts for layer_id, layer in find_layers(model).items()})
