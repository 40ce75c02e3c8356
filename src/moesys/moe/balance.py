"""Balance without a loss: a bias per expert that enters the choice and not the weights.

Knows counts and biases; knows nothing of optimizers. The idea: after a step, an expert that was chosen less than the
mean gets a little more bias, one that was chosen more a little less. Source: arXiv 2408.15664, algorithm 1;
DeepSeek-V3. Scope: ``step``, the choices of all its micro-batches, dropped ones included; `BiasBalancer` adds them up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moesys.moe.layers import find_layers
from moesys.moe.routing import Routing


def compute_selection_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """Returns (experts,): bias + rate * sign(mean count - count).

    counts_E: (experts,) assignments per expert over the scope; with the sum over ranks it is global.
    """
    counts_E = counts_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(counts_E.mean() - counts_E)


class BiasBalancer:
    """Counts the choices of a step and then moves the biases of a model's routers. Without biases it does nothing.

    Raises `RoutingError` when two MoE layers of the model have the same id.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            layer_id: layer for layer_id, layer in find_layers(model).items() if layer.bias_update_rate > 0
        }
        self._counts: dict[int, Tensor] = {}

    def add(self, routings: Mapping[int, Routing]) -> None:
        """Adds the choices of one forward pass, by layer. Waits for no device."""
        for layer_id in self._layers.keys() & routings.keys():
            counts_E = routings[layer_id].compute_expert_counts()
            if layer_id in self._counts:
                counts_E += self._counts[layer_id]
            self._counts[layer_id] = counts_E

    @torch.no_grad()
    def apply(self) -> None:
        """Moves the biases by what was added since the last call, and starts anew. Call it after the optimizer."""
        for layer_id, counts_E in self._counts.items():
            layer = self._layers[layer_id]
            bias_E = layer.router.selection_bias_E
            assert bias_E is not None
            bias_E.copy_(compute_selection_bias(bias_E, counts_E, layer.bias_update_rate))
        self.discard()

    def discard(self) -> None:
        """Forgets what was added, as for a step that was skipped."""
        self._counts = {}
