"""Whether a run may go on from a checkpoint, and whether it goes on in the same bits.

Every setting that touches a weight must be the one it was saved with. The backend of sums may be another, which costs
the last bits. Knows names and values; does not know how a checkpoint lies on the disk. The idea: what a checkpoint does
not say, because it is older than the key, is what the key's default does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesys.checkpoint import describe_config_difference
from moesys.config import Config
from moesys.errors import CheckpointError
from moesys.kernels.native.cpu_level import find_cpu_level
from moesys.kernels.products import prefers_native

# Settings that may change between a checkpoint and its resumption: they alter no weight.
_FREE_KEYS = {
    "training": {"log_every", "evaluate_every", "evaluate_tokens", "checkpoint_every", "keep_checkpoints",
                 "max_skipped_steps"},
    "runtime": {"threads", "tensorboard"},
}  # fmt: skip

_BACKEND_WORDS = {"threads": "{} threads", "products": "{} products", "cpu_level": "CPU level {}"}


@dataclass(frozen=True)
class Backend:
    """What the last bits of a run depend on beside its config. The fields are keys of a checkpoint's metadata."""

    threads: int
    """Of CPU arithmetic."""
    products: str
    """Whose matrix products train: ``native`` or ``torch``; see `moesys.kernels.multiply`."""
    cpu_level: str
    """Instructions of the CPU that are used; see `moesys.kernels.native.cpu_level`."""

    @classmethod
    def find(cls, device: torch.device) -> Backend:
        """Returns what computes here and now. Raises `KernelError` for a ``MOESYS_CPU_LEVEL`` that this CPU lacks."""
        products = "native" if prefers_native(torch.empty(0, device=device)) else "torch"
        return cls(torch.get_num_threads(), products, find_cpu_level().name)

    def to_metadata(self) -> dict[str, int | str]:
        """Returns the fields by name, for a checkpoint's metadata."""
        return asdict(self)

    def describe_change(self, saved: Mapping[str, Any]) -> str | None:
        """Returns a sentence on what a checkpoint's metadata has otherwise; None where nothing is.

        A field that an older checkpoint lacks counts as unchanged.
        """
        changed = [name for name, value in asdict(self).items() if name in saved and saved[name] != value]
        if not changed:
            return None
        before, now = (
            ", ".join(_BACKEND_WORDS[name].format(values[name]) for name in changed)
            for values in (saved, asdict(self))
        )
        return f"the run was saved with {before} and goes on with {now}: sums may differ in the last bits"


def require_same_config(saved: Mapping[str, Any], current: Config) -> None:
    """Raises `CheckpointError` with one line per setting that differs from the checkpoint's."""
    difference = describe_config_difference(
        _drop_free_keys(_add_missing_keys(saved)), _drop_free_keys(current.model_dump(mode="json"))
    )
    if difference:
        raise CheckpointError(
            f"the checkpoint belongs to another config:\n{difference}\n"
            "restore these lines in the run's config.toml, or start a new run"
        )


def _add_missing_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    defaults = Config().model_dump(mode="json")
    return {section: defaults.get(section, {}) | keys for section, keys in tree.items()}


def _drop_free_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        section: {key: value for key, value in keys.items() if key not in _FREE_KEYS.get(section, ())}
        for section, keys in tree.items()
    }
