"""Keys of ``config.json`` that many families share, read into our records and written from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moesys.errors import ModelFormatError
from moesys.models.attention import AttentionConfig
from moesys.models.config import DecoderConfig, DenseConfig
from moesys.models.families.family import require
from moesys.models.families.rope_keys import read_rope, write_rope
from moesys.models.mixer import MixerConfig
from moesys.models.norm import NormConfig
from moesys.models.rope import RopeConfig
from moesys.moe import MoEConfig

Keys = Mapping[str, Any]
FeedForwards = tuple[MoEConfig | DenseConfig, ...]


def read_decoder(
    keys: Keys,
    mixers: tuple[MixerConfig, ...],
    feed_forwards: FeedForwards,
    norm: NormConfig | None = None,
    **options: Any,
) -> DecoderConfig:
    """Reads what every decoder has around its layers; ``options`` are further fields of the record.

    norm: None for RMS norms with the epsilon of the keys.
    """
    require_silu(keys)
    return DecoderConfig(
        vocab_size=keys["vocab_size"],
        hidden_size=keys["hidden_size"],
        mixers=mixers,
        feed_forwards=feed_forwards,
        tie_embeddings=keys.get("tie_word_embeddings", False),
        max_positions=keys["max_position_embeddings"],
        norm=NormConfig(keys["rms_norm_eps"]) if norm is None else norm,
        **options,
    )


def require_silu(keys: Keys) -> None:
    """Raises `ModelFormatError` for another activation than SwiGLU's."""
    activation = keys.get("hidden_act", "silu")
    require(activation == "silu", f"hidden_act {activation!r} is not supported; only 'silu' is")


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_decoder` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
    }


def read_attention(keys: Keys, rope: RopeConfig | None = None, **options: Any) -> AttentionConfig:
    """Reads the sizes of grouped-query attention; ``options`` are further fields of the record.

    rope: None for one over the whole head with the keys' own parameters.
    """
    head_dim = read_head_dim(keys)
    num_heads = keys["num_attention_heads"]
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=keys.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        rope=read_rope(keys, head_dim) if rope is None else rope,
        **options,
    )


def read_head_dim(keys: Keys) -> int:
    """``head_dim``, or the hidden size over the heads."""
    return keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]


def write_attention(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_attention` reads, with those of the rope."""
    attention = find_attention(config)
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_dropout": 0.0,
        **write_rope(attention.rope, config.max_positions),
    }


def find_attention(config: DecoderConfig) -> AttentionConfig:
    """Returns the attention of the first layer; raises `ModelFormatError` where it is of another kind."""
    mixer = config.mixers[0]
    if not isinstance(mixer, AttentionConfig):
        raise ModelFormatError(f"its layers have grouped-query attention, the model's have {mixer.kind}")
    return mixer


def find_moe(config: DecoderConfig) -> MoEConfig:
    """Returns the first MoE layer; raises `ModelFormatError` where there is none."""
    for layer in config.feed_forwards:
        if isinstance(layer, MoEConfig):
            return layer
    raise ModelFormatError("it has MoE layers, the model has none (model.num_experts = 0)")


def read_equal_moe(keys: Keys, **options: Any) -> MoEConfig:
    """Reads the MoE layer of families whose layers are all the same; ``options`` are further fields of the record."""
    return MoEConfig(
        num_experts=keys.get("num_experts") or keys["num_local_experts"],
        top_k=keys["num_experts_per_tok"],
        intermediate_size=keys["intermediate_size"],
        **options,
    )


def write_equal_moe(config: DecoderConfig, num_experts: str = "num_local_experts") -> dict[str, Any]:
    """The keys that `read_equal_moe` reads; ``num_experts`` is what the family calls that one."""
    moe = find_moe(config)
    return {
        num_experts: moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "intermediate_size": moe.intermediate_size,
    }


def find_dense(config: DecoderConfig) -> DenseConfig | None:
    """Returns the first dense layer, None where there is none."""
    return next((layer for layer in config.feed_forwards if isinstance(layer, DenseConfig)), None)


def repeat(mixer: AttentionConfig, keys: Keys) -> tuple[AttentionConfig, ...]:
    """The same mixer in every layer."""
    return (mixer,) * keys["num_hidden_layers"]


def slide(
    mixer: AttentionConfig, is_sliding: Sequence[bool], window: int | None
) -> tuple[AttentionConfig, ...]:
    """The mixer with the window in the layers that slide."""
    return tuple(replace(mixer, sliding_window=window if slides else None) for slides in is_sliding)


def read_layer_types(keys: Keys) -> list[bool] | None:
    """Which layers slide by ``layer_types``; None without that key."""
    types = keys.get("layer_types")
    if types is None:
        return None
    known = {"full_attention": False, "sliding_attention": True}
    if unknown := sorted(set(types) - known.keys()):
        raise ModelFormatError(f"layer_types {unknown} are not supported; {', '.join(known)} are")
    return [known[name] for name in types]


def write_window(config: DecoderConfig) -> dict[str, Any]:
    """The keys of a window that some layers have: ``layer_types`` says which."""
    windows = [mixer.sliding_window for mixer in config.mixers]
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }
