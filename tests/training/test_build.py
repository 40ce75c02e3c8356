"""From the config to records and objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import start

from moesys.config import load_config
from moesys.errors import ConfigError
from moesys.kernels import Activation, ExpertForm
from moesys.models import AttentionConfig, DenseConfig, NormConfig, RopeConfig
from moesys.moe import BalanceScope, Capacity, DropBy, MoEConfig, MoELayer, Normalization, Score, Threshold
from moesys.training.build import (
    build_decoder_config,
    build_model,
    build_objective,
    compute_dtype,
    require_trainable,
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
    assert built.feed_forwards == (DenseConfig(7), MoEConfig(5, 3, 11, Normalization.NONE, 13))
    assert built.mixers == 2 * (
        AttentionConfig(3, 1, 6, RopeConfig(6, 77.0), qkv_bias=True, output_bias=True, sliding_window=9),
    )
    assert (built.vocab_size, built.hidden_size, built.max_positions) == (301, 24, 33)
    assert (built.norm, built.tie_embeddings) == (NormConfig(1e-3), False)


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
    assert moe.capacity == Capacity.deepspeed(1.5, min_capacity=4)


def build_capacity(*settings: str) -> Capacity | None:
    (*_, moe) = build_decoder_config(load_config(None, settings).model, 301, 33).feed_forwards
    assert isinstance(moe, MoEConfig)
    return moe.capacity


def test_tutels_factors_of_zero_and_less_arrive() -> None:
    tutel = "model.capacity_formula=tutel"
    assert build_capacity(tutel, "model.capacity_factor=0") is None
    need = Capacity.from_tutel_factor(-1.5, min_capacity=2, drop_by=DropBy.PROBABILITY)
    assert need == build_capacity(
        tutel, "model.capacity_factor=-1.5", "model.min_capacity=2", "model.drop_by=probability"
    )
    assert build_capacity(tutel, "model.capacity_factor=1.5") == Capacity.tutel(1.5)
    assert build_capacity("model.capacity_factor=1.5", "model.min_capacity=0") == Capacity.deepspeed(
        1.5, min_capacity=0
    )


@pytest.mark.parametrize(
    ("value", "weighting"),
    [("true", Normalization.AFTER), ("false", Normalization.NONE), ("before", Normalization.BEFORE)],
)
def test_the_normalisation_arrives(value: str, weighting: Normalization) -> None:
    config = load_config(None, [f"model.normalize_top_k={value}"])
    (*_, moe) = build_decoder_config(config.model, 301, 33).feed_forwards
    assert isinstance(moe, MoEConfig)
    assert moe.weighting is weighting


def test_a_layer_too_small_to_drop_anything_has_no_limit() -> None:
    config = load_config(None, ["model.num_experts=[0,2,2,16]", "model.capacity_factor=1.25"])
    layers = build_decoder_config(config.model, 301, 33).feed_forwards
    limits = [layer.capacity for layer in layers if isinstance(layer, MoEConfig)]
    assert limits == [None, None, Capacity.deepspeed(1.25)]


@pytest.mark.parametrize(
    ("settings", "form", "has_bias"),
    [
        ((), ExpertForm(), False),
        (("model.expert_activation=gelu", "model.expert_bias=true"), ExpertForm(Activation.GELU), True),
        (("model.expert_activation=relu",), ExpertForm(Activation.RELU), False),
        (
            ("model.expert_activation=clamped_swiglu", "model.expert_limit=5", "model.expert_alpha=1.5"),
            ExpertForm(Activation.CLAMPED_SWIGLU, 5.0, 1.5),
            False,
        ),
    ],
)
def test_the_form_of_the_experts_arrives(settings: tuple[str, ...], form: ExpertForm, has_bias: bool) -> None:
    (*_, moe) = build_decoder_config(load_config(None, settings).model, 301, 33).feed_forwards
    assert isinstance(moe, MoEConfig)
    assert (moe.form, moe.expert_bias) == (form, has_bias)


UNTRAINABLE = [
    (["model.top_k=1"], r"^model\.top_k \(1\) with normalisation makes .* use model\.normalize_top_k=false"),
    (["model.top_k=1", "model.normalize_top_k=before"], r"^model\.top_k \(1\) with normalisation"),
    (["model.top_k=1", "model.num_experts=[0, 4]"], r"^model\.top_k \(1\) with normalisation"),
    (["model.capacity_factor=9"], r"^model\.capacity_factor \(9\.0\) can never drop .* model\.top_k 2 an expert"),
    (["model.router_min_score=0.2", "model.top_k=1", "model.normalize_top_k=false"],
     r"^model\.router_min_score \(0\.2\) has no effect with model\.top_k \(1\)"),
    (["model.router_min_score=1.5"], r"^model\.router_min_score \(1\.5\) must be between 0 and 1"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), UNTRAINABLE, ids=[" ".join(s) for s, _ in UNTRAINABLE])
def test_what_a_layer_refuses_is_told_with_the_keys_that_a_user_set(
    settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        require_trainable(load_config(None, settings))


@pytest.mark.parametrize(
    "more",
    [
        ["model.normalize_top_k=false"],
        ["model.num_experts=1"],
        ["model.num_experts=[1, 0]"],
        ["model.top_k=2"],
    ],
    ids=str,
)
def test_one_expert_per_token_is_allowed_where_its_weight_is_not_fixed(more: list[str]) -> None:
    """A layer of one expert has nothing to choose, so there is nothing that normalising would take away."""
    require_trainable(load_config(None, ["model.top_k=1", *more]))


def test_a_run_that_cannot_train_is_refused_before_its_data_is_prepared(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesys.training.trainer.prepare_data", pytest.fail)
    with pytest.raises(ConfigError, match=r"model\.top_k \(1\)"):
        start(corpus, tmp_path / "run", "model.top_k=1")
    assert not (tmp_path / "run").exists()


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
