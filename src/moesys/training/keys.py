"""What a user calls the options of a model.

Knows the words of the config and those of the records' own errors; does not know the rules. The idea: a rule stands
once, in the layer or in the family of checkpoints, and whoever broke it from a config is told which keys to change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from moesys.errors import ConfigError, RoutingError, ShapeError

_KEYS = {
    "num_experts": "model.num_experts",
    "top_k": "model.top_k",
    "intermediate_size": "model.expert_intermediate_size",
    "weighting=Normalization.NONE": "model.normalize_top_k=false",
    "weighting": "model.normalize_top_k",
    "shared_intermediate_size": "model.shared_expert_intermediate_size",
    "weight_scale": "model.top_k_scale",
    "num_groups": "model.expert_groups",
    "top_groups": "model.top_k_groups",
    "min_score": "model.router_min_score",
    "bias_update_rate": "model.balance_bias_rate",
    "capacity factor": "model.capacity_factor",
    "min_capacity": "model.min_capacity",
    "drop_by": "model.drop_by",
    "shared_expert_gate": "model.shared_expert_gate",
}
"""By the words that the layer's errors use."""

_FIELDS = {
    **_KEYS,
    "capacity": "model.capacity_factor",
    "expert_bias": "model.expert_bias",
    "feed_forward": "model.num_experts",
    "form.activation": "model.expert_activation",
    "form.alpha": "model.expert_alpha",
    "form.limit": "model.expert_limit",
    "is_residual": "model.residual_expert",
    "output_bias": "model.attention_bias",
    "qk_norm": "model.qk_norm",
    "qkv_bias": "model.attention_bias",
    "score": "model.router_score",
    "selection_bias": "model.balance_bias_rate",
    "sliding_window": "model.sliding_window",
    "tie_embeddings": "model.tie_embeddings",
}
"""By the fields that `moesys.models.Family.find_misfits` names."""

_WORDS = re.compile(rf"(?<![\w.])(?:the )?({'|'.join(map(re.escape, _KEYS))})\b")

_DIFFERING_FIELD = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, _FIELDS))})(?= would be )")


def name_misfits(reasons: str) -> str:
    """Returns why no layout holds a model, with the user's keys beside what a layout would change."""
    return _DIFFERING_FIELD.sub(lambda found: f"{found[1]} ({_FIELDS[found[1]]})", reasons)


@contextmanager
def naming_keys() -> Iterator[None]:
    """Turns a `RoutingError` or `ShapeError` about a layer's options into a `ConfigError` about a user's keys."""
    try:
        yield
    except (RoutingError, ShapeError) as error:
        raise ConfigError(_WORDS.sub(lambda found: _KEYS[found[1]], str(error))) from error
