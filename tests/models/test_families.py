"""Families as data: configurations there and back, and every parameter under a name of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_models import DENSE, MOE, make_config, make_model

from moesys.errors import ModelFormatError
from moesys.models import DecoderConfig, choose_family
from moesys.moe import Capacity, Score

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
    ("config", "qwen3_moe", "mixtral"),
    [
        (
            make_config(feed_forwards=(DENSE,)),
            ["it has MoE layers, the model has none (model.num_experts = 0)"],
            [
                "it has MoE layers, the model has none (model.num_experts = 0)",
                "it has no qk_norm, the model has (model.qk_norm = true)",
                "all its layers are MoE, the model has dense ones (model.num_experts)",
            ],
        ),
        (
            make_config(feed_forwards=(MOE, replace(MOE, num_experts=8, shared_intermediate_size=3))),
            [
                "its MoE layers all have the same shape, the model's differ: num_experts [4, 8], "
                "shared_intermediate_size [0, 3]",
                "it has no shared expert (model.shared_expert_intermediate_size)",
            ],
            [
                "its MoE layers all have the same shape, the model's differ: num_experts [4, 8], "
                "shared_intermediate_size [0, 3]",
                "it has no shared expert (model.shared_expert_intermediate_size)",
                "it has no qk_norm, the model has (model.qk_norm = true)",
            ],
        ),
        (
            make_config(qk_norm=False, qkv_bias=True, feed_forwards=(replace(MOE, weighting=Normalization.NONE),)),
            [
                "it always has qk_norm, the model has none (model.qk_norm = false)",
                "its attention biases are all or none",
            ],
            [
                "it has no attention biases (model.attention_bias = true)",
                "it always normalises the top-k weights (model.normalize_top_k = false)",
            ],
        ),
        (
            make_config(feed_forwards=(MOE, DENSE, replace(DENSE, intermediate_size=12))),
            ["its dense layers all have the same width, the model's have [10, 12]"],
            [
                "its dense layers all have the same width, the model's have [10, 12]",
                "it has no qk_norm, the model has (model.qk_norm = true)",
                "all its layers are MoE, the model has dense ones (model.num_experts)",
            ],
        ),
    ],
)
def test_a_model_that_no_layout_holds_hears_every_reason(
    config: DecoderConfig, qwen3_moe: list[str], mixtral: list[str]
) -> None:
    with pytest.raises(ModelFormatError) as caught:
        choose_family(config)
    assert str(caught.value).splitlines() == [
        "no Hugging Face layout holds this model:",
        f"  qwen3_moe: {'; '.join(qwen3_moe)}",
        f"  mixtral: {'; '.join(mixtral)}",
    ]


def test_what_mixtral_cannot_hold_goes_to_qwen3() -> None:
    assert choose_family(make_config(feed_forwards=(MOE, MOE))).model_type == "qwen3_moe"
    unnormalised = (replace(MOE, weighting=Normalization.NONE),)
    assert choose_family(make_config(feed_forwards=unnormalised)).model_type == "qwen3_moe"


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_older_files_leave_out_or_null(model_type: str) -> None:
    config = CONFIGS[model_type]
    family = choose_family(config)
    keys = family.write_config(config)
    del keys["rope_parameters"]
    assert family.read_config(keys) == config
    heads = config.attention.num_heads
    nulls = {"num_key_value_heads": None, "head_dim": None, "hidden_size": 8 * heads}
    derived = family.read_config(keys | nulls).attention
    assert (derived.num_kv_heads, derived.head_dim) == (heads, 8)


@pytest.mark.parametrize(
    ("sparse_step", "dense_ids", "moe_ids"),
    [(1, [], [0, 1, 2, 3]), (2, [], [1, 3]), (3, None, [2]), (1, [0, 3], [1, 2]), (2, [1], [3])],
)
def test_which_layers_of_a_qwen3_have_experts(
    sparse_step: int, dense_ids: list[int] | None, moe_ids: list[int]
) -> None:
    family = choose_family(QWEN)
    keys = family.write_config(make_config(feed_forwards=(MOE, MOE, DENSE, DENSE)))
    keys |= {"decoder_sparse_step": sparse_step, "mlp_only_layers": dense_ids}
    assert family.read_config(keys).moe_layer_ids == moe_ids


def test_a_window_of_a_qwen3_counts_only_where_it_is_used() -> None:
    family = choose_family(QWEN)
    keys = family.write_config(QWEN)
    assert family.read_config(keys | {"use_sliding_window": False}).attention.sliding_window is None


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        (
            {"rope_parameters": {"rope_theta": 1.0, "factor": 2.0}},
            r"rope_parameters \['factor'\] are not supported",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* give unquantised weights"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only 'silu' is"),
    ],
)
def test_unsupported_keys_are_errors(keys: dict[str, object], reason: str) -> None:
    family = choose_family(QWEN)
    with pytest.raises(ModelFormatError, match=reason):
        family.read_config(family.write_config(QWEN) | keys)


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ({"score": Score.SIGMOID}, "score softmax, the model's have sigmoid"),
        ({"weight_scale": 2.5}, "weight_scale 1.0, the model's have 2.5"),
        ({"min_score": 0.1}, "min_score None, the model's have 0.1"),
        ({"bias_update_rate": 0.1}, "bias_update_rate 0.0, the model's have 0.1"),
        ({"capacity": Capacity.unbounded()}, "capacity None, the model's have Capacity"),
        ({"is_residual": True}, "is_residual False, the model's have True"),
        ({"expert_bias": True}, "expert_bias False, the model's have True"),
    ],
)
def test_no_layout_silently_drops_a_special_option(option: dict[str, Any], shown: str) -> None:
    for config in CONFIGS.values():
        special = tuple(replace(f, **option) if f is MOE else f for f in config.feed_forwards)
        with pytest.raises(ModelFormatError) as caught:
            choose_family(replace(config, feed_forwards=special))
        assert str(caught.value).count(f"its MoE layers have {shown}") == 2


def test_layers_that_differ_in_an_option_are_named_with_it() -> None:
    config = make_config(feed_forwards=(MOE, replace(MOE, min_score=0.2)))
    with pytest.raises(ModelFormatError, match=r"the model's differ: min_score \[0.2, None\]"):
        choose_family(config)
