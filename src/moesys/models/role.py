"""What a parameter is for. Weight decay, precision and placement go by role, never by shape or by name."""

from __future__ import annotations

from enum import Enum


class Role(Enum):
    """The role of a parameter in the model."""

    EMBEDDING = "embedding"
    PROJECTION = "projection"
    BIAS = "bias"
    NORM = "norm"
    ROUTER = "router"
    EXPERT = "expert"
