"""Finds the role of every parameter by the kind of the module that holds it."""

from __future__ import annotations

from torch import nn

from moesys.models.mixer import Mixer
from moesys.models.norm import RMSNorm
from moesys.models.role import Role
from moesys.moe import ExpertBank, Router

__all__ = ["Role", "classify_parameters"]


def classify_parameters(model: nn.Module) -> dict[str, Role]:
    """Returns the role of each parameter by its name; raises `TypeError` for a module that has no known role."""
    roles: dict[str, Role] = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            roles[f"{module_name}.{name}" if module_name else name] = _find_role(module, name)
    return roles


def _find_role(module: nn.Module, name: str) -> Role:
    match module:
        case nn.Embedding():
            return Role.EMBEDDING
        case nn.Linear():
            return Role.BIAS if name == "bias" else Role.PROJECTION
        case RMSNorm() | nn.LayerNorm():
            return Role.BIAS if name == "bias" else Role.NORM
        case Router():
            return Role.BIAS if name == "bias_E" else Role.ROUTER
        case ExpertBank():
            return Role.BIAS if "bias" in name else Role.EXPERT
        case Mixer() if name in module.roles:
            return module.roles[name]
        case _:
            raise TypeError(f"the parameter {name!r} of {type(module).__name__} has no role; add it to Role")
