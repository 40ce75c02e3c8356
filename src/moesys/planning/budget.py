"""How much memory of a tier may be used: a size that bounds everything, or a share of the model's own weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moesys.errors import ConfigError
from moesys.units import parse_bytes

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class Budget:
    """Of one tier.

    tier:       what people call the memory, such as ``device`` or ``RAM``.
    is_share:   whether it bounds weights only; a size also holds the KV cache and what computing needs besides.
    """

    tier: str
    size_bytes: int
    is_share: bool = False


def parse_budget(text: str, option: str, tier: str, weight_bytes: int) -> Budget:
    """Returns the budget of a size such as ``8GiB`` or of a share of ``weight_bytes`` such as ``50%``.

    Raises `ConfigError` that names the option.
    """
    share = _SHARE.fullmatch(text.strip())
    if share is None:
        if "%" in text:
            raise ConfigError(
                f"{option} ({text!r}) must be a size or a share of the weights; try 8GiB or 50%"
            )
        return Budget(tier, parse_bytes(text, option))
    percent = float(share[1])
    if not 0 < percent <= 100:
        raise ConfigError(f"{option} ({text!r}) must be above 0% and at most 100% of the weights")
    return Budget(tier, int(weight_bytes * percent / 100), is_share=True)
