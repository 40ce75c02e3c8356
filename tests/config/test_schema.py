"""The schema: names that must not change unnoticed, meanings, limits, derived numbers."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from moesys.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    RuntimeConfig,
    TrainingConfig,
    load_config,
)
from moesys.config.load import list_keys

KEYS = {
    "model": "init hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size num_experts top_k "
    "expert_intermediate_size expert_activation expert_limit expert_alpha expert_bias "
    "shared_expert_intermediate_size normalize_top_k top_k_scale router_score "
    "router_min_score expert_groups top_k_groups balance_bias_rate capacity_factor capacity_formula min_capacity "
    "drop_by shared_expert_gate residual_expert qk_norm attention_bias "
    "sliding_window rope_theta norm_epsilon tie_embeddings init_std",
    "data": "source format text_field chat_template chat_answers chat_date overlong tokenizer vocab_size "
    "sequence_length heldout_fraction attend_across_documents seed",
    "training": "steps batch_sequences micro_batch_sequences learning_rate final_learning_rate_ratio "
    "schedule warmup_steps decay_fraction weight_decay beta1 beta2 epsilon gradient_clip balance_loss "
    "balance_scope router_z_loss dtype seed log_every evaluate_every evaluate_tokens checkpoint_every keep_checkpoints "
    "max_skipped_steps",
    "memory": "activation_checkpointing loss_chunk_tokens",
    "runtime": "device threads kernel tensorboard",
}
"""Users' files hold these. Renaming or removing one breaks them: do it on purpose, with a changelog line."""

SECTIONS = [Config, ModelConfig, DataConfig, TrainingConfig, MemoryConfig, RuntimeConfig]


def test_public_keys_are_frozen() -> None:
    expected = [f"{section}.{leaf}" for section, leaves in KEYS.items() for leaf in leaves.split()]
    assert list(list_keys()) == expected


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_section_and_field_says_what_it_means(section: type[Config]) -> None:
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description.rstrip().endswith("."), name


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_sections_are_frozen_and_know_their_keys(section: type[Config]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        section.model_validate({"nonsense": 1})
    name = next(iter(section.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section(), name, getattr(section(), name))


def test_json_schema_carries_defaults_and_meanings() -> None:
    model = Config.model_json_schema()["$defs"]["ModelConfig"]["properties"]
    assert model["top_k"]["default"] == 2
    assert model["top_k"]["description"] == "Experts that compute each token."


def test_a_date_is_a_toml_date_or_a_text() -> None:
    assert load_config(
        overrides=["data.format=chat", "data.source=x", "data.chat_date=2025-05-01"]
    ).data.chat_date == (DataConfig(format="chat", chat_date="2025-05-01").chat_date)
    for wrong in ("yesterday", "2025-13-01", "2025-05-01T10:00:00"):
        with pytest.raises(ValidationError, match="must be a day as YYYY-MM-DD"):
            DataConfig(format="chat", chat_date=wrong)


def test_derived_numbers() -> None:
    model = ModelConfig(num_experts=[0, 8], num_layers=6)
    assert model.experts_per_layer == (0, 8, 0, 8, 0, 8)
    assert ModelConfig(num_experts=4, num_layers=2).experts_per_layer == (4, 4)
    assert (model.resolved_head_dim, model.resolved_num_kv_heads) == (64, 4)
    assert ModelConfig(head_dim=10, hidden_size=9, num_kv_heads=2).resolved_head_dim == 10
    assert ModelConfig(num_kv_heads=2).resolved_num_kv_heads == 2
    assert TrainingConfig(batch_sequences=6).resolved_micro_batch == 6
    assert TrainingConfig(batch_sequences=6, micro_batch_sequences=2).resolved_micro_batch == 2


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_residual_expert_may_have_any_form_that_a_dense_layer_has(activation: str) -> None:
    options = {"residual_expert": True, "expert_activation": activation, "expert_bias": True}
    assert ModelConfig.model_validate(options).residual_expert


def test_gradient_clip_is_a_number() -> None:
    assert TrainingConfig(gradient_clip=0).gradient_clip == 0
    with pytest.raises(ValidationError, match="gradient_clip"):
        TrainingConfig.model_validate({"gradient_clip": None})


def test_top_k_may_equal_the_smallest_layer() -> None:
    assert ModelConfig(num_experts=[0, 4, 0, 16], top_k=4).top_k == 4
    assert ModelConfig(num_experts=0, top_k=64).experts_per_layer == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_groups": 3}, r"num_experts \(8\) must be divisible by expert_groups \(3\); try 1, 2, 4, 8"),
        ({"expert_groups": 2, "top_k_groups": 3}, r"top_k_groups \(3\) must not exceed expert_groups \(2\)"),
        (
            {"expert_groups": 8, "top_k": 2},
            r"top_k \(2\) must not exceed the 1 experts of 1 of 8 groups; lower top_k or raise top_k_groups",
        ),
        (
            {"router_min_score": 0.1, "capacity_factor": 1.0},
            r"router_min_score \(0.1\) gives tokens different",
        ),
        ({"router_min_score": 0.1, "expert_groups": 2}, r"router_min_score \(0.1\) gives tokens different"),
        (
            {"capacity_factor": 0.0},
            r"capacity_factor \(0.0\) of 0 or less has a meaning in Tutel's formula only; set model.capacity_formula",
        ),
        (
            {"capacity_factor": -1.5, "capacity_formula": "deepspeed"},
            r"capacity_factor \(-1.5\) of 0 or less",
        ),
        (
            {"residual_expert": True, "expert_activation": "clamped_swiglu"},
            r"expert_activation \(clamped_swiglu\) with expert_bias \(false\); use gelu or relu",
        ),
        (
            {"residual_expert": True, "expert_bias": True},
            r"expert_activation \(swiglu\) with expert_bias \(true\)",
        ),
    ],
)
def test_router_options_that_contradict_each_other_are_refused(
    options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(options)


def test_groups_must_divide_every_layer() -> None:
    groups = {"expert_groups": 4, "top_k_groups": 2}
    assert ModelConfig.model_validate({"num_experts": [0, 4, 8, 16], **groups}).expert_groups == 4
    with pytest.raises(ValidationError, match=r"num_experts \(6\) must be divisible by expert_groups \(4\)"):
        ModelConfig.model_validate({"num_experts": [8, 6], **groups})
