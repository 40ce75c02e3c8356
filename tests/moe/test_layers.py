"""Finding the layers of a model: every mapping by layer id is safe only where ids differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moesys.errors import RoutingError
from moesys.moe import (
    BiasBalancer,
    Execution,
    LoadMeter,
    LocalDispatcher,
    MoEConfig,
    MoELayer,
    find_layers,
    make_resident_source,
)

CONFIG = MoEConfig(3, 2, 4)


def make_model(*layer_ids: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    for layer_id in layer_ids:
        model.append(nn.ModuleDict({"ffn": MoELayer(4, CONFIG, layer_id=layer_id)}))
    return model


def test_layers_are_found_by_id_wherever_they_are() -> None:
    model = make_model(5, 2)
    found = find_layers(model)
    assert list(found) == [5, 2]
    assert found[2] is model.get_submodule("2.ffn")
    layer = MoELayer(4, CONFIG, layer_id=3)
    assert find_layers(layer) == {3: layer}
    assert find_layers(nn.Linear(4, 4)) == {}


def test_one_layer_used_twice_is_one_layer() -> None:
    layer = MoELayer(4, CONFIG)
    assert find_layers(nn.ModuleList([layer, layer])) == {0: layer}


@pytest.mark.parametrize("make", [find_layers, BiasBalancer, LoadMeter, make_resident_source])
def test_two_layers_with_one_id_are_an_error_with_both_names(make: Callable[[nn.Module], object]) -> None:
    with pytest.raises(
        RoutingError, match=r"layers '1.ffn' and '3.ffn' both have layer_id 0, .* a layer_id of its own"
    ):
        make(make_model(0, 1, 0))
    make(make_model(0, 1, 2))


def test_the_resident_source_of_a_model_holds_the_experts_of_each_layer() -> None:
    model = make_model(5, 2)
    execution = Execution(LocalDispatcher(), make_resident_source(model))
    x = torch.randn(3, 4)
    for layer in find_layers(model).values():
        assert torch.equal(layer(x, execution)[0], layer(x)[0])
