"""The keys of a rotary embedding in ``config.json``, in either of their places.

Newer files have ``rope_parameters``, older ones ``rope_theta`` and ``rope_scaling``, which wins where both are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesys.errors import ModelFormatError
from moesys.models.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    Scaling,
    YarnScaling,
)

_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"
_SHARE = "partial_rotary_factor"


def read_rope(
    keys: Mapping[str, Any],
    head_dim: int,
    *,
    share: float | None = None,
    theta: float = 10000.0,
    default: Mapping[str, Any] | None = None,
    is_interleaved: bool = False,
) -> RopeConfig:
    """Reads the rotary embedding of heads of ``head_dim`` elements.

    share:    of the elements that are turned, the family's own where the file names none; None for a family that turns
              all of them.
    theta:    the family's own where the file names none.
    default:  the family's parameters where the file has none.

    Raises `ModelFormatError` for a kind that is not supported, naming those that are.
    """
    rope = dict(keys.get("rope_scaling") or keys.get("rope_parameters") or default or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _KINDS:
        hint = "; its angles change with the length, also those in a cache" if kind == "dynamic" else ""
        raise ModelFormatError(f"rope_type {kind!r} is not supported{hint}; {', '.join(_KINDS)} are")
    base = rope.get("rope_theta") or keys.get("rope_theta") or theta
    named = rope.get(_SHARE, keys.get(_SHARE))
    if share is None and named not in (None, 1.0):
        raise ModelFormatError(f"{_SHARE} ({named}) is not supported: the family turns whole heads")
    try:
        scaling = _read_scaling(kind, rope, keys)
    except KeyError as error:
        raise ModelFormatError(f"rope_type {kind!r} needs the key {error} in rope_parameters") from None
    # A share was once a number of elements divided by others, which floats do not always give back.
    dim = head_dim if share is None else int(head_dim * (share if named is None else named) + 1e-6)
    return RopeConfig(dim, float(base), scaling, is_interleaved)


def _read_scaling(kind: str, rope: Mapping[str, Any], keys: Mapping[str, Any]) -> Scaling | None:
    original = keys.get(_ORIGINAL) or rope.get(_ORIGINAL) or keys["max_position_embeddings"]
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(rope["factor"])
        case "llama3":
            return Llama3Scaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
        case "yarn":
            factor = rope["factor"] or keys["max_position_embeddings"] / original
            return YarnScaling(
                factor=float(factor),
                original_positions=original,
                beta_fast=rope.get("beta_fast") or 32.0,
                beta_slow=rope.get("beta_slow") or 1.0,
                attention_factor=rope.get("attention_factor"),
                mscale=rope.get("mscale"),
                mscale_all_dim=rope.get("mscale_all_dim"),
                truncates=rope.get("truncate", True),
            )
        case _:
            common = rope.get("attention_factor")
            return LongRopeScaling(
                short_factors=tuple(rope["short_factor"]),
                long_factors=tuple(rope["long_factor"]),
                original_positions=original,
                factor=rope.get("factor") or keys["max_position_embeddings"] / original,
                short_attention_factor=rope.get("short_mscale") or common,
                long_attention_factor=rope.get("long_mscale") or common,
            )


def write_rope(rope: RopeConfig, max_positions: int, **further: Any) -> dict[str, Any]:
    """The keys that `read_rope` reads, in both places where there is scaling; ``further`` ones go beside the angles."""
    parameters = {"rope_theta": rope.theta, **_write_scaling(rope.scaling, max_positions), **further}
    keys: dict[str, Any] = {"rope_theta": rope.theta, "rope_parameters": parameters}
    if rope.scaling is not None:
        keys["rope_scaling"] = parameters
    return keys


def _write_scaling(scaling: Scaling | None, max_positions: int) -> dict[str, Any]:
    match scaling:
        case None:
            return {"rope_type": "default"}
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                _ORIGINAL: scaling.original_positions,
            }
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                _ORIGINAL: scaling.original_positions,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncates,
                **_drop_none(
                    attention_factor=scaling.attention_factor,
                    mscale=scaling.mscale,
                    mscale_all_dim=scaling.mscale_all_dim,
                ),
            }
        case LongRopeScaling():
            short, long = scaling.short_attention_factor, scaling.long_attention_factor
            return {
                "rope_type": "longrope",
                "factor": scaling.factor,
                _ORIGINAL: scaling.original_positions,
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                # PhiMoE reads one per context, all others one for both.
                **_drop_none(
                    short_mscale=short, long_mscale=long, attention_factor=short if short == long else None
                ),
            }


def _drop_none(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
