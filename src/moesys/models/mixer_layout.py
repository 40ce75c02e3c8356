"""What checkpoints call the tensors of a mixer: one small record per kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from moesys.models.attention import Attention
from moesys.models.latent_attention import LatentAttention
from moesys.models.mixer import Mixer
from moesys.models.stored import StoredTensor
from moesys.models.stored_module import list_module, store


class MixerLayout(Protocol):
    """How a kind of mixer is stored. Implementations are frozen records."""

    @property
    def prefix(self) -> str:
        """Of all its tensors, from the block on."""
        ...

    def list_tensors(self, mixer: Any) -> Iterator[StoredTensor]:
        """Yields every tensor of a mixer of the kind, named from ``prefix`` on."""
        ...


@dataclass(frozen=True)
class AttentionLayout:
    """Queries, keys and values by themselves."""

    prefix: str = "self_attn"

    def list_tensors(self, mixer: Attention) -> Iterator[StoredTensor]:
        """See `MixerLayout`."""
        for name, parameter in mixer.qkv_proj.named_parameters():
            for letter, view in zip("qkv", parameter.split(mixer.widths), strict=True):
                yield store(f"{letter}_proj.{name}", view)
        yield from list_module(mixer.o_proj, "o_proj")
        if mixer.q_norm is not None and mixer.k_norm is not None:
            yield from list_module(mixer.q_norm, "q_norm")
            yield from list_module(mixer.k_norm, "k_norm")
        if mixer.sinks_H is not None:
            yield store("sinks", mixer.sinks_H)


_LATENT_NAMES = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b_proj": "kv_b_proj",
    "o_proj": "o_proj",
}


@dataclass(frozen=True)
class LatentAttentionLayout:
    """Every matrix as we hold it."""

    prefix: str = "self_attn"

    def list_tensors(self, mixer: LatentAttention) -> Iterator[StoredTensor]:
        """See `MixerLayout`."""
        for name, child in mixer.named_children():
            yield from list_module(child, _LATENT_NAMES[name])


MIXER_LAYOUTS: Mapping[type[Mixer], MixerLayout] = MappingProxyType(
    {Attention: AttentionLayout(), LatentAttention: LatentAttentionLayout()}
)
"""Of the kinds that all families store alike."""
