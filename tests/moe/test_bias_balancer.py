"""Balance without a loss: the update of the bias, and the holder that counts a step."""

from __future__ import annotations

import torch
from fake_seams import make_routing
from torch import Tensor, nn

from moesys.moe import BiasBalancer, MoEConfig, MoELayer, Routing, Score, compute_selection_bias


def make_layers(rate: float = 0.25) -> nn.ModuleList:
    biased = MoEConfig(3, 1, 4, score=Score.SIGMOID, bias_update_rate=rate)
    return nn.ModuleList(
        [
            MoELayer(4, biased, layer_id=2),
            MoELayer(4, MoEConfig(3, 1, 4), layer_id=3),
            MoELayer(4, biased, layer_id=5),
        ]
    )


def read_bias(layer: nn.Module) -> list[float] | None:
    assert isinstance(layer, MoELayer)
    bias: Tensor | None = layer.router.selection_bias_E
    return None if bias is None else bias.tolist()


def test_an_expert_below_the_mean_gains_and_one_above_loses() -> None:
    bias, counts = torch.tensor([0.5, 0.0, -1.0, 0.0]), torch.tensor([8, 0, 3, 1])
    expected = torch.tensor([0.5 - 0.1, 0.0 + 0.1, -1.0, 0.0 + 0.1])
    torch.testing.assert_close(compute_selection_bias(bias, counts, 0.1), expected)


def test_the_bias_moves_by_the_counts_of_all_micro_batches() -> None:
    layers = make_layers()
    balancer = BiasBalancer(layers)
    # Each micro-batch alone would say otherwise: expert 0 leads in the first, expert 1 over both.
    balancer.add({2: make_routing([[0], [0], [1]], 3), 3: make_routing([[0]], 3), 5: make_routing([[2]], 3)})
    balancer.add({2: make_routing([[1], [1], [2]], 3), 5: make_routing([[2]], 3, dropped=[True])})
    balancer.apply()
    assert read_bias(layers[0]) == [0.0, -0.25, 0.25]
    assert read_bias(layers[1]) is None
    assert read_bias(layers[2]) == [0.25, 0.25, -0.25]
    balancer.apply()
    assert read_bias(layers[0]) == [0.0, -0.25, 0.25]


def test_a_discarded_step_moves_nothing() -> None:
    layers = make_layers()
    balancer = BiasBalancer(layers)
    balancer.add({2: make_routing([[0]], 3)})
    balancer.discard()
    balancer.apply()
    assert read_bias(layers[0]) == [0.0, 0.0, 0.0]


def test_counting_leaves_the_routings_alone() -> None:
    balancer, routing = BiasBalancer(make_layers()), make_routing([[0], [1]], 3)
    for _ in range(3):
        balancer.add({2: routing})
    assert routing.expert_ids.tolist() == [0, 1]


def test_a_skewed_router_becomes_even() -> None:
    """Tokens that all like the same experts are spread within some steps, by the bias alone."""
    torch.manual_seed(0)
    layer = MoELayer(8, MoEConfig(8, 2, 4, score=Score.SIGMOID, bias_update_rate=0.02))
    x = torch.randn(256, 8) + 1.0
    with torch.no_grad():
        layer.router.weight_ED.normal_().mul_(torch.linspace(0.1, 0.4, 8).unsqueeze(1))
    balancer = BiasBalancer(layer)

    def compute_imbalance(routing: Routing) -> float:
        counts = routing.compute_expert_counts()
        return (counts.max() / counts.float().mean()).item()

    first = compute_imbalance(layer.router(x))
    for _ in range(60):
        balancer.add({0: layer.router(x)})
        balancer.apply()
    assert first > 2.0
    assert compute_imbalance(layer.router(x)) < 1.35
