"""What a parameter is for. Weight decay, precision and placement go by role, never by shape or by name."""

from __future__ import annotations

from enum import Enum

from torch import nn

from moesys.models.attention import Attention
from moesys.models.norm import RMSNorm
from moesys.moe import ExpertBank, Router


class Role(Enum):
    """The role of a parameter in the model."""

    EMBEDDING = "embedding"
    PROJECTION = "projection"
    BIAS = "bias"
    NORM = "norm"
    ROUTER = "router"
    EXPERT = "expert"


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
        case Attention():
            return Role.BIAS
        case Router():
            return Role.BIAS if name == "bias_E" else Role.ROUTER
        case ExpertBank():
            return Role.BIAS if "bias" in name else Role.EXPERT
        case _:
            raise TypeError(f"the parameter {name!r} of {type(module).__name__} has no role; add it to Role")
