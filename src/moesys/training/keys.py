"""What a user calls the options of a MoE layer.

Knows the words of the config and those of the layer's own errors; does not know the rules. The idea: a rule stands
once, in the layer, and whoever broke it from a config is told which keys to change.
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

_WORDS = re.compile(rf"(?<![\w.])(?:the )?({'|'.join(map(re.escape, _KEYS))})\b")


@contextmanager
def naming_keys() -> Iterator[None]:
    """Turns a `RoutingError` or `ShapeError` about a layer's options into a `ConfigError` about a user's keys."""
    try:
        yield
    except (RoutingError, ShapeError) as error:
        raise ConfigError(_WORDS.sub(lambda found: _KEYS[found[1]], str(error))) from error
