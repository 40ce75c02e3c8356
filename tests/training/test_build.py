"""From the config to records and objects."""

from __future__ import annotations

import pytest
import torch

from moesys.config import load_config
from moesys.errors import ConfigError
from moesys.models import DenseConfig
from moesys.moe import BalanceScope, Capacity, DropBy, MoEConfig, MoELayer, Score, Threshold
from moesys.training.build import (
    build_decoder_config,
    build_model,
    build_objective,
    compute_dtype,
    resolve_dtype,
    select_device,
)
from moesys.training.step import Objective


def test_every_model_setting_arrives() -> None:
    config = load_config(
        None,
        ["model.hidden_size=24", "model.num_layers=2", "model.num_heads=3", "model.num_kv_heads=1",
         "model.head_dim=6", "model.intermediate_size=7", "model.num_experts=[0,5]", "model.top_k=3",
         "model.expert_intermediate_size=11", "model.shared_expert_intermediate_size=13",
         "model.normalize_top_k=false", "model.qk_norm=false", "model.attention_bias=true",
         "model.sliding_window=9", "model.rope_theta=77.0", "model.norm_epsilon=1e-3",
         "model.tie_embeddings=false"],
    )  # fmt: skip
    built = build_decoder_config(config.model, vocab_size=301, max_positions=33)
    assert built.feed_forwards == (DenseConfig(7), MoEConfig(5, 3, 11, False, 13))
    attention = built.attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (3, 1, 6)
    assert (attention.qk_norm, attention.qkv_bias, attention.output_bias) == (False, True, True)
    assert (attention.sliding_window, attention.rope_theta) == (9, 77.0)
    assert (built.vocab_size, built.hidden_size, built.max_positions) == (301, 24, 33)
    assert (built.norm_epsilon, built.tie_embeddings) == (1e-3, False)


def test_every_router_setting_arrives() -> None:
    config = load_config(
        None,
        ["model.num_experts=8", "model.top_k_scale=2.5", "model.router_score=sigmoid", "model.expert_groups=4",
         "model.top_k_groups=2", "model.balance_bias_rate=0.01", "model.capacity_factor=1.5",
         "model.capacity_formula=tutel", "model.min_capacity=3", "model.drop_by=confidence",
         "model.shared_expert_intermediate_size=6", "model.shared_expert_gate=true", "model.residual_expert=true"],
    )  # fmt: skip
    (*_, moe) = build_decoder_config(config.model, vocab_size=301, max_positions=33).feed_forwards
    assert moe == MoEConfig(
        8,
        2,
        512,
        shared_intermediate_size=6,
        score=Score.SIGMOID,
        weight_scale=2.5,
        num_groups=4,
        top_groups=2,
        bias_update_rate=0.01,
        capacity=Capacity.tutel(1.5, min_capacity=3, drop_by=DropBy.CONFIDENCE),
        shared_expert_gate=True,
        is_residual=True,
    )
    deepspeed = load_config(None, ["model.capacity_factor=1.5"]).model
    (*_, moe) = build_decoder_config(deepspeed, vocab_size=301, max_positions=33).feed_forwards
    assert isinstance(moe, MoEConfig)
    assert moe.capacity == Capacity.deepspeed(1.5, min_capacity=0)


def test_a_pyramid_with_a_threshold_router() -> None:
    settings = ["model.num_experts=[0, 4, 4, 16]", "model.hidden_size=16", "model.num_heads=2",
                "model.expert_intermediate_size=4", "model.router_min_score=0.3", "model.top_k=3"]  # fmt: skip
    model = build_model(load_config(None, settings), 300)
    layers = [block.feed_forward for block in model.blocks if isinstance(block.feed_forward, MoELayer)]
    assert [layer.router.num_experts for layer in layers] == [4, 4, 16]
    assert {layer.router.selection for layer in layers} == {Threshold(3, 0.3)}


def test_the_objective_is_gathered() -> None:
    config = load_config(
        None,
        ["training.balance_loss=0.2", "training.balance_scope=sequence", "training.router_z_loss=0.3",
         "memory.loss_chunk_tokens=7"],
    )  # fmt: skip
    assert build_objective(config) == Objective(0.2, 0.3, 7, BalanceScope.SEQUENCE)


def test_init_std_and_seed_reach_the_weights() -> None:
    tiny = ["model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.num_experts=0"]
    weights = [
        build_model(load_config(None, [*tiny, *more]), 300).embedding.weight
        for more in (["model.init_std=0.5"], ["training.seed=1"], ["training.seed=1"])
    ]
    assert weights[0].std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0] / 25, weights[1])


def test_devices_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"runtime.device \('gpu'\) is not a device; use cpu, cuda"):
        select_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU here; use cpu"):
        select_device("cuda:1")


@pytest.mark.parametrize(("faster", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_auto_becomes_what_is_faster(faster: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesys.training.build.choose_faster_dtype", lambda device: faster)
    resolved = resolve_dtype(load_config(None, ["training.dtype=auto"]))
    assert resolved.training.dtype == name
    assert compute_dtype(resolved) is faster
    fixed = load_config(None, ["training.dtype=fp32"])
    assert resolve_dtype(fixed) is fixed
