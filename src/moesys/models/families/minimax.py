"""MiniMax-M2. (MiniMax-Text-01 has linear attention, which is a mixer of its own.)"""

from __future__ import annotations

from typing import Any

from moesys.models.attention import QKNorm
from moesys.models.config import DecoderConfig
from moesys.models.families.family import Family, require
from moesys.models.families.keys import (
    Keys,
    find_attention,
    read_attention,
    read_decoder,
    read_equal_moe,
    read_head_dim,
    repeat,
    write_attention,
    write_decoder,
    write_equal_moe,
)
from moesys.models.families.mixtral import NUMBERED
from moesys.models.families.rope_keys import read_rope, write_rope
from moesys.models.layout import Layout, MoELayout, StackedExperts
from moesys.moe import Score

_FIXED = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
}
"""Keys of published files whose other values would need other arithmetic."""


def _read_minimax_m2(keys: Keys) -> DecoderConfig:
    for name, value in _FIXED.items():
        found = keys.get(name, value)
        require(found == value, f"{name} {found!r} is not supported; only {value!r} is")
    mixers = set(keys.get("attn_type_list") or [1])
    require(mixers == {1}, f"attn_type_list {sorted(mixers)} is not supported; only 1, softmax attention, is")
    moe = read_equal_moe(
        keys,
        score=Score.SIGMOID,
        selection_bias=True,
    )
    head_dim = read_head_dim(keys)
    rope = read_rope(keys, head_dim, share=keys.get("rotary_dim", head_dim) / head_dim, theta=5e6)
    attention = read_attention(keys, rope, qk_norm=QKNorm.WHOLE)
    return read_decoder(keys, repeat(attention, keys), (moe,) * keys["num_hidden_layers"])


def _write_minimax_m2(config: DecoderConfig) -> dict[str, Any]:
    attention = find_attention(config)
    share = attention.rope.dim / attention.head_dim
    return {
        **write_decoder(config),
        **write_attention(config),
        **write_rope(attention.rope, config.max_positions, partial_rotary_factor=share),
        **_FIXED,
        "rotary_dim": attention.rope.dim,
        **write_equal_moe(config),
    }


def _make_layout(prefix: str, experts: Any) -> MoELayout:
    return MoELayout(prefix, experts, selection_bias="e_score_correction_bias")


MINIMAX_M2 = Family(
    ("minimax_m2",),
    "MiniMaxM2ForCausalLM",
    Layout((_make_layout("block_sparse_moe", NUMBERED), _make_layout("mlp", StackedExperts()))),
    _read_minimax_m2,
    _write_minimax_m2,
    "sigmoid routing with a selection bias; queries and keys normalised over the whole projection",
)
