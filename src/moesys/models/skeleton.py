"""A decoder without memory: every parameter has its shape and lies on the meta device.

Reading a checkpoint and describing one begin with it. The idea: no numbers are drawn, because to draw some that nobody
keeps torch loads its symbolic shapes, which takes most of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moesys.models.config import DecoderConfig
from moesys.models.decoder import Decoder


class _DrawNothing(TorchFunctionMode):
    """In it, `torch.nn.init.normal_` leaves a tensor as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is nn.init.normal_:
            return None
        return func(*args, **(kwargs or {}))


def make_skeleton(config: DecoderConfig) -> Decoder:
    """Returns the decoder on the meta device: it has shapes and no values. Raises what `Decoder` raises."""
    with torch.device("meta"), _DrawNothing():
        return Decoder(config)
