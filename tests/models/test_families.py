"""Families as data: configurations there and back, and every parameter under a name of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_models import DENSE, MOE, make_config, make_model

from moesys.errors import ModelFormatError
from moesys.models import FAMILIES, DecoderConfig, choose_family

QWEN = make_config(feed_forwards=(MOE, DENSE), qkv_bias=True, output_bias=True, sliding_window=5)
MIXTRAL = make_config(feed_forwards=(MOE, MOE), qk_norm=False, tie=False)
CONFIGS = {"qwen3_moe": QWEN, "mixtral": MIXTRAL}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_config_round_trip(model_type: str) -> None:
    config = CONFIGS[model_type]
    family = choose_family(config)
    assert family.model_type == model_type
    assert family.read_config(family.write_config(config)) == config


@pytest.mark.parametrize("model_type", CONFIGS)
def test_tensors_are_views_that_cover_every_parameter_once(model_type: str) -> None:
    model = make_model(CONFIGS[model_type])
    tensors = dict(choose_family(model.config).iterate_tensors(model))
    assert len(tensors) == len(list(choose_family(model.config).iterate_tensors(model)))
    assert sum(t.numel() for t in tensors.values()) == model.count_parameters()
    for tensor in tensors.values():
        tensor.detach().fill_(7.0)
    assert all(bool((p == 7.0).all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (make_config(feed_forwards=(DENSE,)), "the model has none"),
        (make_config(feed_forwards=(MOE, replace(MOE, num_experts=8))), r"the model's have \[4, 8\] experts"),
        (make_config(feed_forwards=(replace(MOE, shared_intermediate_size=3),)), "no shared expert"),
        (make_config(qkv_bias=True), "attention biases are all or none"),
        (make_config(qk_norm=False, feed_forwards=(MOE, DENSE)), "all its layers are MoE"),
    ],
)
def test_a_model_that_no_layout_holds_says_why(config: DecoderConfig, reason: str) -> None:
    with pytest.raises(ModelFormatError, match=reason) as caught:
        choose_family(config)
    assert all(family.model_type in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only 'silu' is"),
    ],
)
def test_unsupported_keys_are_errors(keys: dict[str, object], reason: str) -> None:
    family = choose_family(QWEN)
    with pytest.raises(ModelFormatError, match=reason):
        family.read_config(family.write_config(QWEN) | keys)
