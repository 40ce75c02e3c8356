"""Law 9: every rule of the table fires for a key that was set, and only for one that was set."""

from __future__ import annotations

import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest

from moesys.config import (
    Config,
    DataConfig,
    ModelConfig,
    RuntimeConfig,
    TrainingConfig,
    build_config,
    check_effects,
    dump_toml,
    load_config,
)
from moesys.config.effects import RULES, Rule, find_idle_rules
from moesys.config.load import list_keys
from moesys.errors import IneffectiveOptionError

NO_EXPERTS = "model.num_experts=0"
CHATS = ["data.source=folder", "data.format=chat"]

IDLE: dict[str, list[str]] = {
    "model.top_k": [NO_EXPERTS, "model.top_k=3"],
    "model.expert_intermediate_size": ["model.num_experts=[0, 0]", "model.expert_intermediate_size=8"],
    "model.expert_activation": [NO_EXPERTS, "model.expert_activation=gelu"],
    "model.expert_limit": ["model.expert_activation=swiglu", "model.expert_limit=5.0"],
    "model.expert_alpha": ["model.expert_activation=gelu", "model.expert_alpha=1.0"],
    "model.expert_bias": [NO_EXPERTS, "model.expert_bias=true"],
    "model.shared_expert_intermediate_size": [NO_EXPERTS, "model.shared_expert_intermediate_size=8"],
    "model.normalize_top_k": [NO_EXPERTS, "model.normalize_top_k=false"],
    "model.top_k_scale": [NO_EXPERTS, "model.top_k_scale=2.5"],
    "model.router_score": [NO_EXPERTS, "model.router_score=sigmoid"],
    "model.router_min_score": [NO_EXPERTS, "model.router_min_score=0.2"],
    "model.expert_groups": [NO_EXPERTS, "model.expert_groups=2"],
    "model.top_k_groups": ["model.expert_groups=1", "model.top_k_groups=1"],
    "model.balance_bias_rate": [NO_EXPERTS, "model.balance_bias_rate=0.001"],
    "model.capacity_factor": [NO_EXPERTS, "model.capacity_factor=1.5"],
    "model.capacity_formula": ["model.capacity_formula=tutel"],
    "model.min_capacity": ["model.min_capacity=4"],
    "model.drop_by": ["model.drop_by=probability"],
    "model.shared_expert_gate": ["model.shared_expert_gate=true"],
    "model.residual_expert": [NO_EXPERTS, "model.residual_expert=true"],
    "training.balance_loss": [NO_EXPERTS, "training.balance_loss=0.1"],
    "training.balance_scope": ["training.balance_loss=0", "training.balance_scope=sequence"],
    "training.router_z_loss": [NO_EXPERTS, "training.router_z_loss=0.1"],
    "model.intermediate_size": ["model.num_experts=[4, 8]", "model.intermediate_size=8"],
    "model.sliding_window": ["model.sliding_window=256", "data.sequence_length=256"],
    "data.vocab_size": ["data.tokenizer=t.json", "data.vocab_size=300"],
    "data.tokenizer": ["model.init=folder", "data.tokenizer=t.json"],
    "training.seed": ["model.init=folder", "training.seed=1"],
    "data.chat_template": ["data.source=folder", "data.chat_template=t.jinja"],
    "data.chat_answers": ["data.source=folder", "data.chat_answers=last"],
    "data.chat_date": ["data.source=folder", "data.chat_date=2025-05-01"],
    "data.overlong": ["data.source=folder", "data.overlong=drop"],
    "data.format": ["data.format=text"],
    "data.text_field": ["data.source=folder", "data.format=text", "data.text_field=body"],
    "training.decay_fraction": ["training.decay_fraction=0.5"],
    "training.final_learning_rate_ratio": [
        "training.schedule=wsd",
        "training.decay_fraction=0.0",
        "training.final_learning_rate_ratio=0.5",
    ],
    "training.evaluate_tokens": ["training.evaluate_tokens=100"],
    "training.evaluate_every": ["training.steps=100", "training.evaluate_every=101"],
    "training.checkpoint_every": ["training.steps=100", "training.checkpoint_every=101"],
    "runtime.threads": ["runtime.device=cuda", "runtime.threads=2"],
}
"""For each key, overrides with which it is set and idle; the key's own override is the last that names it."""

EFFECTIVE: dict[str, list[str]] = {
    **{
        key: ["model.num_experts=[0, 4]", *IDLE[key][1:]]
        for key in IDLE
        if IDLE[key][0].startswith("model.num_experts=")
    },
    "model.expert_limit": ["model.expert_activation=clamped_swiglu", "model.expert_limit=5.0"],
    "model.expert_alpha": ["model.expert_activation=clamped_swiglu", "model.expert_alpha=1.0"],
    "model.top_k_groups": ["model.expert_groups=4", "model.top_k_groups=2"],
    "model.capacity_formula": ["model.capacity_factor=1", "model.capacity_formula=tutel"],
    "model.min_capacity": ["model.capacity_factor=1", "model.min_capacity=4"],
    "model.drop_by": ["model.capacity_factor=1", "model.drop_by=probability"],
    "model.shared_expert_gate": ["model.shared_expert_intermediate_size=8", "model.shared_expert_gate=true"],
    "training.balance_scope": ["training.balance_scope=sequence"],
    "model.sliding_window": ["model.sliding_window=255", "data.sequence_length=256"],
    "data.vocab_size": ["data.vocab_size=300"],
    "data.tokenizer": ["data.tokenizer=t.json"],
    "training.seed": ["training.seed=1"],
    "data.chat_template": [*CHATS, "data.chat_template=t.jinja"],
    "data.chat_answers": [*CHATS, "data.chat_answers=last"],
    "data.chat_date": [*CHATS, "data.chat_date=2025-05-01"],
    "data.overlong": [*CHATS, "data.overlong=drop"],
    "data.format": ["data.source=folder", "data.format=text"],
    "data.text_field": ["data.source=hf:a/b", "data.text_field=body"],
    "training.decay_fraction": ["training.schedule=wsd", "training.decay_fraction=0.5"],
    "training.final_learning_rate_ratio": ["training.final_learning_rate_ratio=0.5"],
    "training.evaluate_tokens": ["training.evaluate_every=5", "training.evaluate_tokens=100"],
    "training.evaluate_every": ["training.steps=100", "training.evaluate_every=100"],
    "training.checkpoint_every": ["training.steps=100", "training.checkpoint_every=100"],
    "runtime.threads": ["runtime.threads=2"],
}


def test_every_rule_has_its_cases() -> None:
    keys = [rule.key for rule in RULES]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(IDLE) == set(EFFECTIVE)
    assert set(keys) <= set(list_keys())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_rule_fires_where_the_key_is_set_and_idle(rule: Rule) -> None:
    with pytest.raises(IneffectiveOptionError) as caught:
        load_config(overrides=IDLE[rule.key])
    assert f"{rule.key} has no effect: {rule.reason}" in str(caught.value).splitlines()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
def test_rule_is_silent_where_the_key_has_an_effect(rule: Rule) -> None:
    load_config(overrides=EFFECTIVE[rule.key])


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if rule.key != "model.sliding_window"], ids=lambda r: r.key
)
def test_rule_is_silent_where_the_key_was_not_set(rule: Rule) -> None:
    overrides = [o for o in IDLE[rule.key] if not o.startswith(f"{rule.key}=")]
    config = load_config(overrides=overrides)
    is_idle_by_default = rule.key not in ("training.evaluate_every", "training.checkpoint_every")
    assert (rule in find_idle_rules(config)) is is_idle_by_default


def test_a_model_that_is_given_decides_every_key_of_its_section_but_two() -> None:
    for key in list_keys(ModelConfig, "model."):
        if key not in ("model.init", "model.balance_bias_rate"):
            value = ModelConfig.model_fields[key.removeprefix("model.")].default
            with pytest.raises(
                IneffectiveOptionError, match=f"{key} has no effect: the model's shape is that of model.i"
            ):
                check_effects(Config(model=ModelConfig.model_validate({"init": "folder", key[6:]: value})))
    given = load_config(
        overrides=["model.init=folder", "model.balance_bias_rate=0.001", "training.balance_loss=0.1"]
    )
    written = dump_toml(given)
    assert "[model]\ninit = " in written
    assert "hidden_size" not in written
    assert load_config_text(written) == given


def load_config_text(text: str) -> Config:
    return build_config(tomllib.loads(text))


@pytest.mark.parametrize(("name", "is_idle"), [("a.txt", True), ("a.py", True), ("a.JSONL", False)])
def test_a_text_field_of_a_plain_file_has_no_effect(tmp_path: Path, name: str, is_idle: bool) -> None:
    (tmp_path / name).write_text("{}")
    overrides = [f'data.source="{tmp_path / name}"', "data.text_field=body"]
    with pytest.raises(IneffectiveOptionError, match=r"data\.text_field") if is_idle else nullcontext():
        load_config(overrides=overrides)
    load_config(overrides=[*overrides, "data.format=jsonl"])


@pytest.mark.parametrize("more", ["model.min_capacity=4", "model.drop_by=probability"])
def test_a_factor_of_zero_drops_nothing_so_how_to_drop_has_no_effect(more: str) -> None:
    tutel = ["model.capacity_factor=0", "model.capacity_formula=tutel"]
    assert load_config(overrides=tutel).model.capacity_factor == 0
    with pytest.raises(IneffectiveOptionError, match=r"without a model\.capacity_factor other than 0"):
        load_config(overrides=[*tutel, more])
    load_config(overrides=["model.capacity_factor=-1", "model.capacity_formula=tutel", more])


def test_the_kernel_of_a_dense_model_has_an_effect() -> None:
    assert load_config(overrides=[NO_EXPERTS, "runtime.kernel=reference"]).runtime.kernel == "reference"


def test_a_config_built_in_python_is_judged_by_what_was_set() -> None:
    check_effects(Config(model=ModelConfig(num_experts=0)))
    with pytest.raises(IneffectiveOptionError, match=r"model.top_k has no effect"):
        check_effects(Config(model=ModelConfig(num_experts=0, top_k=2)))
    with pytest.raises(IneffectiveOptionError, match=r"runtime.threads has no effect"):
        check_effects(
            Config(
                runtime=RuntimeConfig(device="cuda", threads=1), data=DataConfig(), training=TrainingConfig()
            )
        )
