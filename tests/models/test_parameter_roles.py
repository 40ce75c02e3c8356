"""Every parameter has a role, found by the kind of its module."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_models import DENSE, MOE, make_config, make_model
from torch import nn

from moesys.models import Decoder, NormConfig, NormKind, Role, classify_parameters


def test_every_parameter_has_the_right_role() -> None:
    shared = replace(MOE, shared_intermediate_size=3)
    model = make_model(make_config(feed_forwards=(shared, DENSE), tie=False, qkv_bias=True, output_bias=True))
    roles = classify_parameters(model)
    assert set(roles) == {name for name, _ in model.named_parameters()}
    by_ending = {
        "embedding.weight": Role.EMBEDDING,
        "head.weight": Role.PROJECTION,
        "qkv_proj.weight": Role.PROJECTION,
        "qkv_proj.bias": Role.BIAS,
        "o_proj.weight": Role.PROJECTION,
        "o_proj.bias": Role.BIAS,
        "norm.weight": Role.NORM,
        "router.weight_ED": Role.ROUTER,
        "experts.gate_up_EFD": Role.EXPERT,
        "experts.down_EDF": Role.EXPERT,
        "shared_expert.gate_up_proj.weight": Role.PROJECTION,
        "shared_expert.down_proj.weight": Role.PROJECTION,
        "feed_forward.gate_up_proj.weight": Role.PROJECTION,
        "feed_forward.down_proj.weight": Role.PROJECTION,
    }
    for name, role in roles.items():
        assert [r for ending, r in by_ending.items() if name.endswith(ending)] == [role], name
    assert set(roles.values()) == set(Role)


def test_the_smaller_parameters_have_roles_of_their_own() -> None:
    layers = (replace(MOE, router_bias=True, expert_bias=True), replace(DENSE, bias=True))
    config = make_config(feed_forwards=layers, tie=False, has_sinks=True)
    config = replace(config, head_bias=True, norm=NormConfig(1e-5, NormKind.LAYER))
    roles = classify_parameters(Decoder(config))
    biases = ("bias", "bias_E", "bias_EF", "bias_ED", "sinks_H")
    for name, role in roles.items():
        if name.endswith(biases):
            assert role is Role.BIAS, name
        elif "norm" in name:
            assert role is Role.NORM, name
        else:
            assert role not in (Role.BIAS, Role.NORM), name
    for ending in (
        "sinks_H",
        "final_norm.bias",
        "router.bias_E",
        "head.bias",
        "down_bias_ED",
        "down_proj.bias",
    ):
        assert any(name.endswith(ending) for name in roles), ending


def test_unknown_module_is_an_error() -> None:
    model = make_model()
    model.blocks[0].input_norm = nn.GroupNorm(2, 12)
    with pytest.raises(TypeError, match=r"parameter 'weight' of GroupNorm has no role; add it to Role"):
        classify_parameters(model)


def test_a_single_module_needs_no_prefix() -> None:
    assert classify_parameters(nn.Linear(2, 2)) == {"weight": Role.PROJECTION, "bias": Role.BIAS}
