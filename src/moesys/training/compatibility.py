"""Whether a run may go on from a checkpoint: every setting that touches a weight must be the one it was saved with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesys.checkpoint import describe_config_difference
from moesys.config import Config
from moesys.errors import CheckpointError

# Settings that may change between a checkpoint and its resumption: they alter no weight.
_FREE_KEYS = {
    "training": {"log_every", "evaluate_every", "evaluate_tokens", "checkpoint_every", "keep_checkpoints",
                 "max_skipped_steps"},
    "runtime": {"threads", "tensorboard"},
}  # fmt: skip


def require_same_config(saved: Mapping[str, Any], current: Config) -> None:
    """Raises `CheckpointError` with one line per setting that differs from the checkpoint's."""
    difference = describe_config_difference(
        _drop_free_keys(saved), _drop_free_keys(current.model_dump(mode="json"))
    )
    if difference:
        raise CheckpointError(
            f"the checkpoint belongs to another config:\n{difference}\n"
            "restore these lines in the run's config.toml, or start a new run"
        )


def _drop_free_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        section: {key: value for key, value in keys.items() if key not in _FREE_KEYS.get(section, ())}
        for section, keys in tree.items()
    }
