"""Small layers, one per kind of router, and how two runs of them are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.moe import Capacity, DropBy, Execution, MoEConfig, MoELayer, Normalization, Score

HIDDEN, NUM_EXPERTS, LAYER = 8, 6, 7

CONFIGS: dict[str, MoEConfig] = {
    "switch": MoEConfig(NUM_EXPERTS, 1, 4, weighting=Normalization.NONE),
    "top-3": MoEConfig(NUM_EXPERTS, 3, 4),
    "every expert": MoEConfig(NUM_EXPERTS, NUM_EXPERTS, 4),
    "deepseek": MoEConfig(
        NUM_EXPERTS,
        2,
        4,
        score=Score.SIGMOID,
        weight_scale=2.5,
        num_groups=3,
        top_groups=2,
        bias_update_rate=0.1,
    ),
    "threshold": MoEConfig(NUM_EXPERTS, 4, 4, min_score=0.15),
    "capacity": MoEConfig(
        NUM_EXPERTS,
        2,
        4,
        capacity=Capacity.deepspeed(0.8, min_capacity=1, drop_by=DropBy.PROBABILITY),
    ),
}


def make_layer(config: MoEConfig, dtype: torch.dtype = torch.float64) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(HIDDEN, config, layer_id=LAYER)
    layer.reset_parameters(std=0.7)
    return layer.to(dtype)


def make_x(num_tokens: int = 13, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def run(layer: MoELayer, execution: Execution | None = None) -> list[Tensor]:
    """Output and all gradients."""
    x = make_x().requires_grad_()
    y, _ = layer(x, execution)
    upstream = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], upstream, allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def assert_all_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)
