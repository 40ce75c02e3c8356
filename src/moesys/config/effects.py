"""Law 9: an option that the user set and that changes nothing in this configuration is an error.

The rules are one table: a key, when it is without effect, and why. Only keys that the user set are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moesys.config.formats import has_fields
from moesys.config.schema import Config, ModelConfig
from moesys.errors import IneffectiveOptionError


class Rule(NamedTuple):
    """When ``key`` has no effect, and the reason with the fix."""

    key: str
    is_idle: Callable[[Config], bool]
    reason: str


def _has_no_experts(config: Config) -> bool:
    return not any(config.model.experts_per_layer)


def _has_no_capacity(config: Config) -> bool:
    return _has_no_experts(config) or config.model.capacity_factor is None


def _drops_nothing(config: Config) -> bool:
    return _has_no_experts(config) or not config.model.capacity_factor


def _clamps_nothing(config: Config) -> bool:
    return _has_no_experts(config) or config.model.expert_activation != "clamped_swiglu"


def _has_no_dense_layers(config: Config) -> bool:
    return all(config.model.experts_per_layer)


def _has_no_chats(config: Config) -> bool:
    return config.data.format != "chat"


def _has_no_text_field(config: Config) -> bool:
    data = config.data
    if data.format == "chat":
        return True
    if data.source.startswith("hf:"):
        return False
    file = Path(data.source).expanduser()
    is_plain_file = data.format == "auto" and file.is_file() and not has_fields(file)
    return data.source == "stdlib" or data.format == "text" or is_plain_file


def _has_init(config: Config) -> bool:
    return config.model.init is not None


_NO_EXPERTS = "model.num_experts makes every layer dense; give some layers experts or drop the key"
_NO_CAPACITY = "nothing is dropped without model.capacity_factor; set it or drop the key"
_NO_DROPS = "nothing is dropped without a model.capacity_factor other than 0; set one or drop the key"
_NO_CLAMP = "it belongs to model.expert_activation=clamped_swiglu; choose that or drop the key"
_NO_CHATS = "it belongs to data.format=chat; choose that or drop the key"

RULES: tuple[Rule, ...] = (
    Rule("model.top_k", _has_no_experts, _NO_EXPERTS),
    Rule("model.expert_intermediate_size", _has_no_experts, _NO_EXPERTS),
    Rule("model.expert_activation", _has_no_experts, _NO_EXPERTS),
    Rule("model.expert_limit", _clamps_nothing, _NO_CLAMP),
    Rule("model.expert_alpha", _clamps_nothing, _NO_CLAMP),
    Rule("model.expert_bias", _has_no_experts, _NO_EXPERTS),
    Rule("model.shared_expert_intermediate_size", _has_no_experts, _NO_EXPERTS),
    Rule("model.normalize_top_k", _has_no_experts, _NO_EXPERTS),
    Rule("model.top_k_scale", _has_no_experts, _NO_EXPERTS),
    Rule("model.router_score", _has_no_experts, _NO_EXPERTS),
    Rule("model.router_min_score", _has_no_experts, _NO_EXPERTS),
    Rule("model.expert_groups", _has_no_experts, _NO_EXPERTS),
    Rule(
        "model.top_k_groups",
        lambda c: _has_no_experts(c) or c.model.top_k_groups == c.model.expert_groups,
        "every token may use every group; set model.expert_groups to more than model.top_k_groups or drop the key",
    ),
    Rule("model.balance_bias_rate", _has_no_experts, _NO_EXPERTS),
    Rule("model.capacity_factor", _has_no_experts, _NO_EXPERTS),
    Rule("model.capacity_formula", _has_no_capacity, _NO_CAPACITY),
    Rule("model.min_capacity", _drops_nothing, _NO_DROPS),
    Rule("model.drop_by", _drops_nothing, _NO_DROPS),
    Rule(
        "model.shared_expert_gate",
        lambda c: _has_no_experts(c) or not c.model.shared_expert_intermediate_size,
        "there is no shared expert; set model.shared_expert_intermediate_size or drop the key",
    ),
    Rule("model.residual_expert", _has_no_experts, _NO_EXPERTS),
    Rule("training.balance_loss", _has_no_experts, _NO_EXPERTS),
    Rule(
        "training.balance_scope",
        lambda c: _has_no_experts(c) or c.training.balance_loss == 0,
        "there is no balance loss; set training.balance_loss, or drop the key",
    ),
    Rule("training.router_z_loss", _has_no_experts, _NO_EXPERTS),
    Rule(
        "model.intermediate_size",
        _has_no_dense_layers,
        "every layer has experts, whose width is model.expert_intermediate_size",
    ),
    Rule(
        "model.sliding_window",
        lambda c: c.model.sliding_window is not None and c.model.sliding_window >= c.data.sequence_length,
        "the window is not shorter than data.sequence_length; make it shorter or drop it",
    ),
    Rule(
        "data.vocab_size",
        lambda c: c.data.tokenizer is not None or c.model.init is not None,
        "data.tokenizer or model.init brings its own vocabulary; drop one of the two",
    ),
    Rule("data.tokenizer", _has_init, "model.init brings its own tokenizer; drop one of the two"),
    Rule("training.seed", _has_init, "the initial weights are those of model.init; drop one of the two"),
    Rule(
        "data.format",
        lambda c: c.data.source == "stdlib" or c.data.source.startswith("hf:"),
        "data.source is not a file or folder, so there is no file format to choose",
    ),
    Rule(
        "data.text_field",
        _has_no_text_field,
        "plain text has no fields, conversations have their own; it is for JSONL, Parquet and Hugging Face datasets",
    ),
    Rule("data.chat_template", _has_no_chats, _NO_CHATS),
    Rule("data.chat_answers", _has_no_chats, _NO_CHATS),
    Rule("data.chat_date", _has_no_chats, _NO_CHATS),
    Rule(
        "data.overlong",
        _has_no_chats,
        "texts are cut into sequences of any length; it belongs to data.format=chat",
    ),
    Rule(
        "training.decay_fraction",
        lambda c: c.training.schedule != "wsd",
        "it belongs to training.schedule=wsd; cosine decays from the end of the warm-up",
    ),
    Rule(
        "training.final_learning_rate_ratio",
        lambda c: c.training.schedule == "wsd" and c.training.decay_fraction == 0,
        "training.decay_fraction=0 never decays",
    ),
    Rule(
        "training.evaluate_tokens",
        lambda c: c.training.evaluate_every is None,
        "it bounds evaluations during the run, and training.evaluate_every is not set",
    ),
    Rule(
        "training.evaluate_every",
        lambda c: (c.training.evaluate_every or 0) > c.training.steps,
        "it is larger than training.steps, so no evaluation would happen",
    ),
    Rule(
        "training.checkpoint_every",
        lambda c: (c.training.checkpoint_every or 0) > c.training.steps,
        "it is larger than training.steps, so no checkpoint would be written early",
    ),
    Rule(
        "runtime.threads",
        lambda c: c.runtime.device != "cpu",
        "it sets the threads of CPU arithmetic, and runtime.device is not cpu",
    ),
)

INIT_RULES: tuple[Rule, ...] = tuple(
    Rule(f"model.{name}", _has_init, "the model's shape is that of model.init; drop one of the two")
    for name in ModelConfig.model_fields
    if name not in ("init", "balance_bias_rate")
)
"""Apart from the others, because they are about nearly every key."""


def check_effects(config: Config) -> None:
    """Raises `IneffectiveOptionError` naming every key that was set and has no effect."""
    reasons: dict[str, str] = {}
    for rule in find_idle_rules(config):
        if _was_set(config, rule.key):
            reasons.setdefault(rule.key, rule.reason)
    if reasons:
        raise IneffectiveOptionError(
            "\n".join(f"{key} has no effect: {reason}" for key, reason in reasons.items())
        )


def find_idle_rules(config: Config) -> list[Rule]:
    """Returns the rules whose key has no effect in this configuration, set by the user or not."""
    return [rule for rule in (*INIT_RULES, *RULES) if rule.is_idle(config)]


def _was_set(config: Config, key: str) -> bool:
    section, leaf = key.split(".")
    return section in config.model_fields_set and leaf in getattr(config, section).model_fields_set
