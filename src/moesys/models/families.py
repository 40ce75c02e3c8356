"""Families of Hugging Face checkpoints as data: names of tensors and of config keys, in both directions.

Every tensor of a checkpoint corresponds to one view of one of our parameters, so reading and writing are the same
list walked in opposite directions. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from moesys.errors import ModelFormatError
from moesys.models.config import AttentionConfig, DecoderConfig, DenseConfig
from moesys.models.decoder import Block, Decoder
from moesys.moe import ExpertBank, MoEConfig, MoELayer, SwiGLU


@dataclass(frozen=True)
class FeedForwardNames:
    """What a family calls the pieces of a layer's feed-forward."""

    prefix: str
    router: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """One checkpoint layout.

    read_config:   from the keys of ``config.json`` to our record.
    write_config:  the keys that `read_config` reads, from our record.
    find_misfits:  why a model cannot be written in this layout; empty when it can.
    """

    model_type: str
    architecture: str
    feed_forward: FeedForwardNames
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    write_config: Callable[[DecoderConfig], dict[str, Any]]
    find_misfits: Callable[[DecoderConfig], list[str]]

    def iterate_tensors(self, model: Decoder) -> Iterator[tuple[str, Tensor]]:
        """Yields (checkpoint name, view of our parameter) for every tensor of the checkpoint."""
        yield "model.embed_tokens.weight", model.embedding.weight
        for layer_id, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            for name, view in self._iterate_block(block):
                yield f"model.layers.{layer_id}.{name}", view
        yield "model.norm.weight", model.final_norm.weight
        if model.head is not None:
            yield "lm_head.weight", model.head.weight

    def _iterate_block(self, block: Block) -> Iterator[tuple[str, Tensor]]:
        yield "input_layernorm.weight", block.input_norm.weight
        yield "post_attention_layernorm.weight", block.post_attention_norm.weight
        yield from _iterate_attention(block)
        names = self.feed_forward
        if isinstance(block.feed_forward, MoELayer):
            yield f"{names.prefix}.{names.router}.weight", block.feed_forward.router.weight_ED
            bank = block.feed_forward.experts
            assert isinstance(bank, ExpertBank)
            for expert_id in range(bank.down_EDF.shape[0]):
                pieces = _iterate_swiglu(names, bank.gate_up_EFD[expert_id], bank.down_EDF[expert_id])
                yield from ((f"{names.prefix}.experts.{expert_id}.{name}", view) for name, view in pieces)
        else:
            dense: SwiGLU = block.feed_forward
            pieces = _iterate_swiglu(names, dense.gate_up_proj.weight, dense.down_proj.weight)
            yield from ((f"{names.prefix}.{name}", view) for name, view in pieces)


def _iterate_attention(block: Block) -> Iterator[tuple[str, Tensor]]:
    attention = block.attention
    c = attention.config
    rows = {"q": c.num_heads * c.head_dim, "k": c.num_kv_heads * c.head_dim, "v": c.num_kv_heads * c.head_dim}
    weights = attention.qkv_proj.weight.split(list(rows.values()))
    for letter, weight in zip(rows, weights, strict=True):
        yield f"self_attn.{letter}_proj.weight", weight
    if c.qkv_bias:
        for letter, bias in zip(rows, attention.qkv_proj.bias.split(list(rows.values())), strict=True):
            yield f"self_attn.{letter}_proj.bias", bias
    yield "self_attn.o_proj.weight", attention.o_proj.weight
    if c.output_bias:
        yield "self_attn.o_proj.bias", attention.o_proj.bias
    if attention.q_norm is not None and attention.k_norm is not None:
        yield "self_attn.q_norm.weight", attention.q_norm.weight
        yield "self_attn.k_norm.weight", attention.k_norm.weight


def _iterate_swiglu(names: FeedForwardNames, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    gate, up = gate_up.chunk(2)
    yield f"{names.gate}.weight", gate
    yield f"{names.up}.weight", up
    yield f"{names.down}.weight", down


def _read_common(
    keys: Mapping[str, Any], feed_forwards: tuple[MoEConfig | DenseConfig, ...], **attention: Any
) -> DecoderConfig:
    if keys.get("rope_scaling"):
        raise ModelFormatError(f"rope_scaling {keys['rope_scaling']!r} is not supported; only null is")
    if keys.get("hidden_act", "silu") != "silu":
        raise ModelFormatError(f"hidden_act {keys['hidden_act']!r} is not supported; only 'silu' is")
    if keys.get("quantization_config"):
        raise ModelFormatError(
            f"quantization_config {keys['quantization_config']!r} is not supported; give unquantised weights"
        )
    num_heads = keys["num_attention_heads"]
    return DecoderConfig(
        vocab_size=keys["vocab_size"],
        hidden_size=keys["hidden_size"],
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=keys["num_key_value_heads"] or num_heads,
            head_dim=keys.get("head_dim") or keys["hidden_size"] // num_heads,
            rope_theta=_read_rope_theta(keys),
            **attention,
        ),
        feed_forwards=feed_forwards,
        norm_epsilon=keys["rms_norm_eps"],
        tie_embeddings=keys.get("tie_word_embeddings", False),
        max_positions=keys["max_position_embeddings"],
    )


def _read_rope_theta(keys: Mapping[str, Any]) -> float:
    """Reads either place: ``rope_parameters``, or ``rope_theta`` beside the other keys in older files."""
    rope = keys.get("rope_parameters") or {"rope_theta": keys["rope_theta"]}
    rope_type = rope.get("rope_type", "default")
    if rope_type != "default":
        raise ModelFormatError(
            f"rope_type {rope_type!r} is not supported; only the default rotary embedding is"
        )
    if unknown := sorted(rope.keys() - {"rope_type", "rope_theta"}):
        raise ModelFormatError(
            f"rope_parameters {unknown} are not supported; only rope_type and rope_theta are"
        )
    return float(rope["rope_theta"])


def _write_common(config: DecoderConfig) -> dict[str, Any]:
    a = config.attention
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "rope_theta": a.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": a.rope_theta},
        "attention_dropout": 0.0,
    }


def _read_qwen3_moe(keys: Mapping[str, Any]) -> DecoderConfig:
    moe = MoEConfig(
        num_experts=keys.get("num_experts") or keys["num_local_experts"],
        top_k=keys["num_experts_per_tok"],
        intermediate_size=keys["moe_intermediate_size"],
        normalize_top_k=keys.get("norm_topk_prob", False),
    )
    dense = DenseConfig(keys["intermediate_size"])
    dense_ids, sparse_step = keys.get("mlp_only_layers") or [], keys.get("decoder_sparse_step", 1)
    return _read_common(
        keys,
        tuple(
            dense if i in dense_ids or (i + 1) % sparse_step else moe
            for i in range(keys["num_hidden_layers"])
        ),
        qk_norm=True,
        qkv_bias=keys.get("attention_bias", False),
        output_bias=keys.get("attention_bias", False),
        sliding_window=keys["sliding_window"] if keys.get("use_sliding_window") else None,
    )


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    moe, dense = _find_moe(config), _find_dense(config)
    return _write_common(config) | {
        "attention_bias": config.attention.qkv_bias,
        "use_sliding_window": config.attention.sliding_window is not None,
        "sliding_window": config.attention.sliding_window,
        "num_experts": moe.num_experts,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.normalize_top_k,
        "decoder_sparse_step": 1,
        "intermediate_size": moe.intermediate_size if dense is None else dense.intermediate_size,
        "mlp_only_layers": [i for i in range(config.num_layers) if i not in config.moe_layer_ids],
    }


def _find_qwen3_moe_misfits(config: DecoderConfig) -> list[str]:
    misfits = _find_common_misfits(config)
    if not config.attention.qk_norm:
        misfits.append("it always has qk_norm, the model has none (model.qk_norm = false)")
    if config.attention.qkv_bias != config.attention.output_bias:
        misfits.append("its attention biases are all or none")
    return misfits


def _read_mixtral(keys: Mapping[str, Any]) -> DecoderConfig:
    moe = MoEConfig(
        num_experts=keys["num_local_experts"],
        top_k=keys["num_experts_per_tok"],
        intermediate_size=keys["intermediate_size"],
        normalize_top_k=True,
    )
    return _read_common(keys, (moe,) * keys["num_hidden_layers"], sliding_window=keys.get("sliding_window"))


def _write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    moe = _find_moe(config)
    return _write_common(config) | {
        "sliding_window": config.attention.sliding_window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "intermediate_size": moe.intermediate_size,
        "router_jitter_noise": 0.0,
    }


def _find_mixtral_misfits(config: DecoderConfig) -> list[str]:
    misfits = _find_common_misfits(config)
    if config.attention.qk_norm:
        misfits.append("it has no qk_norm, the model has (model.qk_norm = true)")
    if config.attention.qkv_bias or config.attention.output_bias:
        misfits.append("it has no attention biases (model.attention_bias = true)")
    if len(config.moe_layer_ids) != config.num_layers:
        misfits.append("all its layers are MoE, the model has dense ones (model.num_experts)")
    if any(isinstance(layer, MoEConfig) and not layer.normalize_top_k for layer in config.feed_forwards):
        misfits.append("it always normalises the top-k weights (model.normalize_top_k = false)")
    return misfits


def _find_common_misfits(config: DecoderConfig) -> list[str]:
    misfits = []
    shapes = {layer for layer in config.feed_forwards if isinstance(layer, MoEConfig)}
    if not shapes:
        misfits.append("it has MoE layers, the model has none (model.num_experts = 0)")
    if len(shapes) > 1:
        misfits.append(
            f"its MoE layers all have the same shape, the model's differ: {_describe_shapes(shapes)}"
        )
    widths = {layer.intermediate_size for layer in config.feed_forwards if isinstance(layer, DenseConfig)}
    if len(widths) > 1:
        misfits.append(f"its dense layers all have the same width, the model's have {sorted(widths)}")
    if any(shape.shared_intermediate_size for shape in shapes):
        misfits.append("it has no shared expert (model.shared_expert_intermediate_size)")
    return misfits + sorted({misfit for shape in shapes for misfit in _find_special_options(shape)})


def _find_special_options(moe: MoEConfig) -> list[str]:
    """Names the options that no layout here can hold: all beyond sizes, top-k, normalisation and shared expert."""
    plain = MoEConfig(
        moe.num_experts, moe.top_k, moe.intermediate_size, moe.normalize_top_k, moe.shared_intermediate_size
    )
    differing = [f.name for f in fields(MoEConfig) if getattr(moe, f.name) != getattr(plain, f.name)]
    return [
        f"its MoE layers have {name} {getattr(plain, name)}, the model's have {getattr(moe, name)}"
        for name in differing
    ]


def _describe_shapes(shapes: Iterable[MoEConfig]) -> str:
    """Names the fields in which the shapes differ, with their values."""
    values = {field.name: {getattr(shape, field.name) for shape in shapes} for field in fields(MoEConfig)}
    return ", ".join(f"{name} {sorted(found, key=str)}" for name, found in values.items() if len(found) > 1)


def _find_moe(config: DecoderConfig) -> MoEConfig:
    return next(layer for layer in config.feed_forwards if isinstance(layer, MoEConfig))


def _find_dense(config: DecoderConfig) -> DenseConfig | None:
    return next((layer for layer in config.feed_forwards if isinstance(layer, DenseConfig)), None)


FAMILIES: tuple[Family, ...] = (
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        feed_forward=FeedForwardNames("mlp", "gate", "gate_proj", "up_proj", "down_proj"),
        read_config=_read_qwen3_moe,
        write_config=_write_qwen3_moe,
        find_misfits=_find_qwen3_moe_misfits,
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        feed_forward=FeedForwardNames("block_sparse_moe", "gate", "w1", "w3", "w2"),
        read_config=_read_mixtral,
        write_config=_write_mixtral,
        find_misfits=_find_mixtral_misfits,
    ),
)


def choose_family(config: DecoderConfig) -> Family:
    """Returns the layout that holds the model; raises `ModelFormatError` saying why each one does not."""
    for family in FAMILIES:
        if not family.find_misfits(config):
            return family
    reasons = "\n".join(f"  {f.model_type}: {'; '.join(f.find_misfits(config))}" for f in FAMILIES)
    raise ModelFormatError(f"no Hugging Face layout holds this model:\n{reasons}")
