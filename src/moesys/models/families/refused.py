"""Kinds of checkpoints that are refused by name, and why. What nobody has described yet is said, not guessed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_NOT_DESCRIBED = "it has no description in moesys yet"

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "minimax": "most of its layers have lightning attention, a mixer that moesys does not have",
        "qwen3_next": "most of its layers have a gated delta rule, a mixer that moesys does not have",
        "qwen3_5_moe": "most of its layers have a gated delta rule, a mixer that moesys does not have",
        "kimi_linear": "most of its layers have a gated delta rule, a mixer that moesys does not have",
        "granitemoehybrid": "most of its layers are Mamba's, a mixer that moesys does not have",
        "lfm2_moe": "most of its layers are short convolutions, a mixer that moesys does not have",
        "deepseek_v32": "its attention sees only the tokens that an indexer picks",
        "glm_moe_dsa": "its attention sees only the tokens that an indexer picks",
        "jetmoe": "its attention is made of experts too",
        "kimi_k25": "it takes images; its text part alone, saved as deepseek_v3, is read",
        "minimax_m3_vl": "it takes images",
        "deepseek_v4": _NOT_DESCRIBED,
        "glm4_moe_lite": _NOT_DESCRIBED,
        "granitemoeshared": _NOT_DESCRIBED,
        "ernie4_5_moe": _NOT_DESCRIBED,
        "hunyuan_v1_moe": _NOT_DESCRIBED,
        "cohere2_moe": _NOT_DESCRIBED,
        "exaone_moe": _NOT_DESCRIBED,
        "afmoe": _NOT_DESCRIBED,
    }
)
"""The reason by ``model_type``."""
