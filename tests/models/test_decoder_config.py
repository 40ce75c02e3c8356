"""The decoder's record: checks and counts by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_models import DENSE, MOE, VOCAB, make_config, make_model

from moesys.errors import ShapeError
from moesys.kernels import Activation, ExpertForm
from moesys.models import (
    AttentionConfig,
    LatentAttentionConfig,
    LongRopeScaling,
    Role,
    RopeConfig,
    classify_parameters,
    compute_mean_visible_keys,
)
from moesys.moe import MoEConfig


def test_heads_must_fit() -> None:
    with pytest.raises(ShapeError, match=r"num_heads \(4\) must be divisible by num_kv_heads \(3\)"):
        AttentionConfig(num_heads=4, num_kv_heads=3, head_dim=8, rope=RopeConfig(8))
    with pytest.raises(ShapeError, match=r"rotary dimensions \(7\) must be even"):
        RopeConfig(7)
    with pytest.raises(ShapeError, match=r"rotary dimensions \(10\) must not exceed head_dim \(8\)"):
        AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(10))
    with pytest.raises(ShapeError, match=r"every layer needs a mixer and a feed-forward record, got 1 and 2"):
        replace(make_config(), mixers=make_config().mixers[:1])
    with pytest.raises(ShapeError, match="tie_embeddings"):
        replace(make_config(tie=True), head_bias=True)


def test_matmul_parameters_by_hand() -> None:
    """hidden 12; 4 query, 2 key/value heads of 6; a MoE layer of 2 of 4 experts of 6; a dense one of 10."""
    attention = 12 * 24 + 2 * 12 * 12 + 24 * 12
    moe = 4 * 12 + 2 * 3 * 12 * 6
    dense = 3 * 12 * 10
    config = make_config()
    assert config.num_matmul_parameters_per_token == 2 * attention + moe + dense + VOCAB * 12
    shared = MoEConfig(4, 2, 6, shared_intermediate_size=5)
    with_shared = make_config(feed_forwards=(shared, DENSE))
    assert with_shared.num_matmul_parameters_per_token - config.num_matmul_parameters_per_token == 3 * 12 * 5


@pytest.mark.parametrize(
    "options",
    [
        {"shared_intermediate_size": 3},
        {"shared_intermediate_size": 3, "shared_expert_gate": True, "is_residual": True},
        {"is_residual": True, "expert_bias": True, "form": ExpertForm(Activation.GELU)},
    ],
    ids=["shared", "gated-and-residual", "gelu"],
)
@pytest.mark.parametrize("tie", [True, False])
def test_matmul_parameters_equal_the_modules_weights(tie: bool, options: dict[str, Any]) -> None:
    """With every expert chosen, they are all projections, experts and routers, plus the head."""
    model = make_model(make_config(feed_forwards=(MoEConfig(4, 4, 6, **options), DENSE), tie=tie))
    roles = classify_parameters(model)
    counted = {Role.PROJECTION, Role.EXPERT, Role.ROUTER}
    weights = sum(p.numel() for name, p in model.named_parameters() if roles[name] in counted)
    head = model.head_weight_VD.numel() if tie else 0
    assert model.config.num_matmul_parameters_per_token == weights + head


WINDOWS = [(None, 100), (None, 1), (16, 10_000), (16, 17), (16, 16), (16, 8), (1, 5)]


def count_visible_keys(window: int | None, context: int) -> float:
    return sum(i + 1 if window is None else min(i + 1, window) for i in range(context)) / context


@pytest.mark.parametrize(("window", "context"), WINDOWS)
def test_mean_visible_keys_equal_a_count_over_positions(window: int | None, context: int) -> None:
    expected = count_visible_keys(window, context)
    assert compute_mean_visible_keys(window, context) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("window", "context"), WINDOWS)
def test_training_flops_by_hand(window: int | None, context: int) -> None:
    """Forward 2 per weight, backward twice that. Scores and values, in each of 2 layers: 2 products of
    heads x head_dim per visible key, 2 operations each."""
    config = make_config(sliding_window=window)
    per_key = 2 * 2 * 4 * 6
    visible = count_visible_keys(window, context)
    expected = 3 * (2 * config.num_matmul_parameters_per_token + 2 * per_key * visible)
    assert config.compute_training_flops_per_token(context) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("query_rank", [None, 5])
def test_latent_attention_is_counted_by_its_modules(query_rank: int | None) -> None:
    mixer = LatentAttentionConfig(4, query_rank, 7, 6, 3, RopeConfig(2))
    config = replace(make_config(), mixers=(mixer, mixer))
    model = make_model(config)
    roles = classify_parameters(model)
    weights = sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".mixer." in name and roles[name] is Role.PROJECTION
    )
    assert 2 * mixer.count_weights(12) == weights
    per_key = 2 * 4 * ((6 + 2) + 3)
    expected = 3 * (2 * config.num_matmul_parameters_per_token + 2 * per_key * count_visible_keys(None, 9))
    assert config.compute_training_flops_per_token(9) == pytest.approx(expected, rel=1e-12)


def test_positions_end_with_the_first_limit() -> None:
    assert make_config().position_limit == 2048
    short = LongRopeScaling((1.0,) * 3, (2.0,) * 3, original_positions=40, factor=2.0)
    limited = make_config(rope=RopeConfig(6, scaling=short))
    assert limited.position_limit == 40
    assert replace(limited, max_positions=30).position_limit == 30
    mixed = (make_config().mixers[0], limited.mixers[0])
    assert replace(limited, mixers=mixed).position_limit == 40


def test_records_are_frozen_and_equal_by_value() -> None:
    assert make_config() == make_config()
    with pytest.raises(AttributeError):
        MOE.top_k = 3  # type: ignore[misc]
