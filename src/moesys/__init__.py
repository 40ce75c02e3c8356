"""moesys trains Mixture-of-Experts models on the memory you have and runs MoE models that do not fit in it.

Names are loaded when first used, so that ``import moesys`` and ``moesys --help`` need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from moesys.errors import MoesysError
    from moesys.inference import Engine, load
    from moesys.moe import MoEConfig, MoELayer

_HOMES = {
    "Engine": "moesys.inference",
    "MoEConfig": "moesys.moe",
    "MoELayer": "moesys.moe",
    "MoesysError": "moesys.errors",
    "load": "moesys.inference",
}

__all__ = ["Engine", "MoEConfig", "MoELayer", "MoesysError", "__version__", "load"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("moesys")
    if name not in _HOMES:
        raise AttributeError(f"module 'moesys' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
