"""A ``config.json`` whose values cannot be meant is refused by name, before anything is built from it."""

from __future__ import annotations

from typing import Any

import pytest

from family_keys import FAMILY_KEYS
from moesys.errors import ModelFormatError
from moesys.models import FAMILIES, Family

BY_TYPE = {family.model_type: family for family in FAMILIES}


def read(model_type: str, **changes: Any) -> Any:
    family: Family = BY_TYPE[model_type]
    return family.read({**FAMILY_KEYS[model_type], **changes})


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_what_the_families_write_is_sound(model_type: str) -> None:
    family = BY_TYPE[model_type]
    config = read(model_type)
    assert family.read(family.write_config(config)) == config


@pytest.mark.parametrize(
    ("model_type", "key", "value", "field"),
    [
        ("qwen3_moe", "rms_norm_eps", "x", "epsilon is 'x', not a number"),
        ("qwen3_moe", "rms_norm_eps", None, "epsilon is None, which must be set"),
        ("qwen3_moe", "rms_norm_eps", float("nan"), "epsilon is nan, not finite"),
        ("qwen3_moe", "num_experts_per_tok", 1.5, "top_k is 1.5, not a whole number"),
        ("qwen3_moe", "tie_word_embeddings", "false", "tie_embeddings is 'false', not true or false"),
        ("qwen3_moe", "max_position_embeddings", "x", "max_positions is 'x', not a whole number"),
        ("qwen3_moe", "num_hidden_layers", 0, "the number of layers is 0"),
        ("mixtral", "sliding_window", 0, "sliding_window is 0, not above zero"),
        ("mixtral", "sliding_window", "x", "sliding_window is 'x', not a whole number"),
        ("mixtral", "hidden_size", -8, "hidden_size is -8, not above zero"),
        ("deepseek_v3", "routed_scaling_factor", float("nan"), "weight_scale is nan, not finite"),
        ("deepseek_v3", "rope_interleave", "no", "is_interleaved is 'no', not true or false"),
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": 0}, "factor is 0, not above zero"),
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": "x"}, "factor is 'x', not a number"),
        ("llama", "rope_parameters", {"rope_theta": -5.0}, "theta is -5.0, not above zero"),
        (
            "llama",
            "rope_parameters",
            {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
            "has no finite angles",
        ),
    ],
)
def test_a_value_that_cannot_be_meant_is_named(model_type: str, key: str, value: Any, field: str) -> None:
    with pytest.raises(ModelFormatError, match=rf"values that no model has: .*{field}"):
        read(model_type, **{key: value})


def test_the_share_of_a_head_that_is_turned_is_read_where_the_rope_is() -> None:
    head_dim = read("glm4_moe").mixers[0].head_dim
    keys = {"rope_parameters": None, "partial_rotary_factor": None}
    inside = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}
    found = read("glm4_moe", **{**keys, "rope_scaling": inside})
    assert found.mixers[0].rope.dim == head_dim // 4
    with pytest.raises(ModelFormatError, match="turns whole heads"):
        read("llama", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5})


def test_yarn_stretches_the_context_that_a_config_leaves_as_it_was() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    stretched = read("llama", max_position_embeddings=80, rope_parameters=yarn)
    assert stretched.position_limit == 256
    assert read("llama", max_position_embeddings=80).position_limit == 80
