"""From a validated config to the records and objects that training runs on."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import torch

from moesys.checkpoint import parse_dtype
from moesys.config import Config, ModelConfig
from moesys.errors import ConfigError
from moesys.kernels import Activation, ExpertForm
from moesys.models import (
    AttentionConfig,
    Decoder,
    DecoderConfig,
    DenseConfig,
    NormConfig,
    QKNorm,
    RopeConfig,
    initialize_weights,
)
from moesys.moe import (
    BalanceScope,
    Capacity,
    CapacityFormula,
    DropBy,
    MoEConfig,
    Normalization,
    Score,
    find_layers,
)
from moesys.planning import choose_faster_dtype
from moesys.training.keys import naming_keys
from moesys.training.step import Objective

_NORMALIZATIONS: dict[bool | str, Normalization] = {
    False: Normalization.NONE,
    True: Normalization.AFTER,
    "before": Normalization.BEFORE,
}


def build_decoder_config(model: ModelConfig, vocab_size: int, max_positions: int) -> DecoderConfig:
    """Translates the model section into the plain record that `Decoder` is built from. Raises `ConfigError`."""
    attention = AttentionConfig(
        num_heads=model.num_heads,
        num_kv_heads=model.resolved_num_kv_heads,
        head_dim=model.resolved_head_dim,
        rope=RopeConfig(model.resolved_head_dim, model.rope_theta),
        qk_norm=QKNorm.PER_HEAD if model.qk_norm else QKNorm.NONE,
        qkv_bias=model.attention_bias,
        output_bias=model.attention_bias,
        sliding_window=model.sliding_window,
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        mixers=(attention,) * len(model.experts_per_layer),
        feed_forwards=tuple(
            _build_feed_forward(model, num_experts) for num_experts in model.experts_per_layer
        ),
        norm=NormConfig(model.norm_epsilon),
        tie_embeddings=model.tie_embeddings,
        max_positions=max_positions,
    )


def build_objective(config: Config) -> Objective:
    """Gathers what is minimised beside the cross entropy."""
    return Objective(
        balance_loss=config.training.balance_loss,
        router_z_loss=config.training.router_z_loss,
        loss_chunk_tokens=config.memory.loss_chunk_tokens,
        balance_scope=BalanceScope(config.training.balance_scope),
    )


def require_trainable(config: Config) -> None:
    """Raises `ConfigError`, naming keys, for a model that cannot be built or whose routers could not learn.

    Takes no memory and no time worth mentioning, so that it can be asked before data is prepared. A model that is given
    has the routers that it has.
    """
    if config.model.init is not None:
        return
    decoder = build_decoder_config(config.model, config.data.vocab_size, config.data.sequence_length)
    with naming_keys(), torch.device("meta"):
        for layer in find_layers(Decoder(decoder)).values():
            layer.router.require_learnable()


def build_model(config: Config, vocab_size: int) -> Decoder:
    """Builds and initialises the float32 model on the configured device, where it starts from nothing."""
    model = Decoder(build_decoder_config(config.model, vocab_size, config.data.sequence_length))
    initialize_weights(model, config.training.seed, config.model.init_std)
    return model.to(select_device(config.runtime.device))


def select_device(name: str) -> torch.device:
    """Returns the device that the config names; raises `ConfigError` where it does not exist."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"runtime.device ({name!r}) is not a device; use cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"runtime.device is {name!r}, but torch {torch.__version__} sees no GPU here; use cpu"
        )
    return device


def resolve_dtype(config: Config) -> Config:
    """Returns the config with ``training.dtype=auto`` replaced by what is faster here, measured."""
    if config.training.dtype != "auto":
        return config
    faster = choose_faster_dtype(select_device(config.runtime.device))
    name = "bf16" if faster is torch.bfloat16 else "fp32"
    return config.model_copy(update={"training": config.training.model_copy(update={"dtype": name})})


def resolve_paths(config: Config) -> Config:
    """Returns the config with the paths of its data made absolute, so that a run can be resumed from anywhere."""
    paths = {
        key: str(Path(value).expanduser().resolve())
        for key in ("source", "tokenizer", "chat_template")
        if (value := getattr(config.data, key)) is not None and Path(value).expanduser().exists()
    }
    return config.model_copy(update={"data": config.data.model_copy(update=paths)}) if paths else config


def resolve_date(config: Config) -> Config:
    """Returns the config with today as the date that chat templates write, so that a resumed run reads the same."""
    if config.data.format != "chat" or config.data.chat_date is not None:
        return config
    today = {"chat_date": date.today().isoformat()}
    return config.model_copy(update={"data": config.data.model_copy(update=today)})


def compute_dtype(config: Config) -> torch.dtype:
    """Returns the torch dtype of a resolved ``training.dtype``."""
    return parse_dtype(config.training.dtype)


def _build_feed_forward(model: ModelConfig, num_experts: int) -> MoEConfig | DenseConfig:
    if num_experts == 0:
        return DenseConfig(model.intermediate_size)
    with naming_keys():
        return MoEConfig(
            num_experts=num_experts,
            top_k=model.top_k,
            intermediate_size=model.expert_intermediate_size,
            weighting=_NORMALIZATIONS[model.normalize_top_k],
            shared_intermediate_size=model.shared_expert_intermediate_size,
            score=Score(model.router_score),
            weight_scale=model.top_k_scale,
            num_groups=model.expert_groups,
            top_groups=model.top_k_groups,
            min_score=model.router_min_score,
            bias_update_rate=model.balance_bias_rate,
            capacity=_build_capacity(model, num_experts),
            shared_expert_gate=model.shared_expert_gate,
            is_residual=model.residual_expert,
            form=ExpertForm(Activation(model.expert_activation), model.expert_limit, model.expert_alpha),
            expert_bias=model.expert_bias,
        )


def _build_capacity(model: ModelConfig, num_experts: int) -> Capacity | None:
    """Gives a limit to the layers where it can drop something, or to all where it can nowhere, which they refuse.

    A factor of 0 drops nothing, as no factor does: the model is a dropless one, also where it is exported.
    """
    if not model.capacity_factor:
        return None
    formula, factor = CapacityFormula(model.capacity_formula), model.capacity_factor
    limited = {n for n in model.experts_per_layer if n and formula.can_drop(n, model.top_k, abs(factor))}
    if limited and num_experts not in limited:
        return None
    return Capacity.by_formula(
        formula, factor, min_capacity=model.min_capacity, drop_by=DropBy(model.drop_by)
    )
