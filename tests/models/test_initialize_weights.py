"""Initial weights are a pure function of the seed and the parameter's name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import DENSE, MOE, make_config
from torch import Tensor

from moesys.models import Decoder, DecoderConfig, Role, classify_parameters, initialize_weights


def initialize(config: DecoderConfig, seed: int = 0, std: float = 0.02) -> dict[str, Tensor]:
    model = Decoder(config)
    initialize_weights(model, seed, std)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_same_seed_gives_same_bits_whatever_was_drawn_before() -> None:
    config = make_config(tie=False)
    first = initialize(config, seed=3)
    torch.manual_seed(99)
    torch.randn(7)
    second = initialize(config, seed=3)
    other = initialize(config, seed=4)
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        if not name.endswith("norm.weight"):
            assert not torch.equal(weight, other[name]), name


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    model = Decoder(make_config())
    torch.manual_seed(5)
    initialize_weights(model, 0)
    assert torch.equal(torch.randn(3), expected)


def test_no_two_experts_and_no_two_layers_are_equal() -> None:
    weights = initialize(make_config(feed_forwards=(MOE, MOE)))
    for kind in ("gate_up_EFD", "down_EDF"):
        experts = [e for name, bank in weights.items() if name.endswith(kind) for e in bank]
        assert len(experts) == 8
        assert len({tuple(e.flatten().tolist()) for e in experts}) == 8
    assert not torch.equal(
        weights["blocks.0.mixer.qkv_proj.weight"], weights["blocks.1.mixer.qkv_proj.weight"]
    )


def test_more_experts_leave_the_first_ones_alone() -> None:
    few, many = (initialize(make_config(feed_forwards=(replace(MOE, num_experts=n),))) for n in (4, 9))
    for kind in ("gate_up_EFD", "down_EDF"):
        name = f"blocks.0.feed_forward.experts.{kind}"
        assert torch.equal(many[name][:4], few[name])


def test_other_layers_leave_a_layer_alone() -> None:
    """Up to the residual scale, which depends on the depth."""
    two, three = (
        initialize(make_config(feed_forwards=layers)) for layers in ((MOE, DENSE), (MOE, DENSE, DENSE))
    )
    name = "blocks.1.feed_forward.gate_up_proj.weight"
    assert torch.equal(two[name], three[name])


def test_spread_and_constants() -> None:
    layers = (replace(MOE, intermediate_size=64), DENSE)
    config = make_config(feed_forwards=layers, tie=False, qkv_bias=True, output_bias=True)
    wide = replace(config, hidden_size=128)
    model = Decoder(wide)
    initialize_weights(model, 0, std=0.1)
    roles = classify_parameters(model)
    for name, weight in model.named_parameters():
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_EDF"))
        match roles[name]:
            case Role.NORM:
                assert torch.equal(weight, torch.ones_like(weight))
            case Role.BIAS:
                assert not weight.any()
            case _:
                expected = 0.1 / 2 if into_residual else 0.1
                assert weight.std().item() == pytest.approx(expected, rel=5 / weight.numel() ** 0.5), name
