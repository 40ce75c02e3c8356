"""The seam of token mixers: what is asked of the part of a block that lets tokens see each other.

A kind of mixer is a record that answers `MixerConfig`, a module derived from `Mixer`, and an entry of a `Layout` that
names its tensors. Nothing outside a kind's own file and its families asks which kind a mixer is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from moesys.models.attend import Attend
from moesys.models.norm import NormConfig
from moesys.models.role import Role
from moesys.models.rope import RopeConfig
from moesys.models.rotary import Rotation


@dataclass(frozen=True)
class CachedTensor:
    """What a mixer keeps of each token: ``num_heads`` times ``size`` elements in the dtype of the weights."""

    num_heads: int
    size: int

    @property
    def num_elements(self) -> int:
        return self.num_heads * self.size


class Mixer(nn.Module, ABC):
    """A mixer as a module. Its projection back into the residual stream is called ``o_proj``, which initial weights are
    scaled by.

    roles:  of the parameters that the mixer holds itself; those of its layers have the layers'.
    """

    roles: ClassVar[Mapping[str, Role]] = MappingProxyType({})

    @abstractmethod
    def forward(self, x_BSD: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        """Takes and returns (batch, sequence, hidden).

        rotation:  of each token by its position, None for a kind without a rope.
        attend:    the way to other tokens. A mixer computes everything else token by token.
        """


@runtime_checkable
class MixerConfig(Protocol):
    """How a block mixes tokens. Implementations are frozen dataclasses."""

    @property
    def kind(self) -> str:
        """What it is called in a sentence."""
        ...

    @property
    def rope(self) -> RopeConfig | None:
        """How queries and keys are turned; None for a mixer without positions."""
        ...

    @property
    def sliding_window(self) -> int | None:
        """Tokens that a token sees, itself included; None for all earlier ones."""
        ...

    @property
    def cached(self) -> tuple[CachedTensor, ...]:
        """What is kept of each token of a sequence, in the order in which the mixer hands it to an `Attend` that
        caches: keys and values, or one tensor that is both."""
        ...

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the float32 tensors that are kept of each sequence, whatever its length; see `Attend.scan`."""
        ...

    def make(self, hidden_size: int, norm: NormConfig, layer_id: int) -> Mixer:
        """Makes the module; ``norm`` is that of the decoder."""
        ...

    def count_weights(self, hidden_size: int) -> int:
        """Returns the weights that multiply each token, without biases and norms."""
        ...

    def count_products(self, context: int) -> float:
        """Returns the multiplications per token that are not by weights, at the mean of a causal ``context``, where
        nothing is kept."""
        ...

    def count_cached_products(self, context: int) -> float:
        """Returns those of a run that keeps `cached`."""
        ...

    def count_step_elements(self, num_tokens: int, num_positions: int) -> int:
        """Returns the most elements that a pass of ``num_tokens`` over sequences of ``num_positions`` holds at once,
        besides weights, what is cached, and the input. A bound."""
        ...
