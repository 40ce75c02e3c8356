"""The decoder's record: checks and counts by hand."""

from __future__ import annotations

import pytest
from small_models import DENSE, MOE, VOCAB, make_config, make_model

from moesys.errors import ShapeError
from moesys.models import AttentionConfig, Role, classify_parameters
from moesys.moe import MoEConfig


def test_heads_must_fit() -> None:
    with pytest.raises(ShapeError, match=r"num_heads \(4\) must be divisible by num_kv_heads \(3\)"):
        AttentionConfig(num_heads=4, num_kv_heads=3, head_dim=8)
    with pytest.raises(ShapeError, match=r"head_dim \(7\) must be even"):
        AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=7)


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


@pytest.mark.parametrize("tie", [True, False])
def test_matmul_parameters_equal_the_modules_weights(tie: bool) -> None:
    """With every expert chosen, they are all projections, experts and routers, plus the head."""
    model = make_model(
        make_config(feed_forwards=(MoEConfig(4, 4, 6, shared_intermediate_size=3), DENSE), tie=tie)
    )
    roles = classify_parameters(model)
    counted = {Role.PROJECTION, Role.EXPERT, Role.ROUTER}
    weights = sum(p.numel() for name, p in model.named_parameters() if roles[name] in counted)
    head = model.head_weight_VD.numel() if tie else 0
    assert model.config.num_matmul_parameters_per_token == weights + head


def test_training_flops_by_hand() -> None:
    """Forward 2 per weight, backward twice that. Scores and values: 2 products of heads x head_dim per
    visible key, 2 operations each; a token sees half of the context on average."""
    config = make_config()
    per_key = 2 * 2 * 4 * 6
    expected = 3 * (2 * config.num_matmul_parameters_per_token + 2 * per_key * 100 / 2)
    assert config.compute_training_flops_per_token(100) == expected


def test_training_flops_of_a_window_stop_growing() -> None:
    config = make_config(sliding_window=16)
    per_key = 2 * 2 * 4 * 6
    expected = 3 * (2 * config.num_matmul_parameters_per_token + 2 * per_key * 16)
    assert config.compute_training_flops_per_token(10_000) == expected
    short = make_config().compute_training_flops_per_token(8)
    assert config.compute_training_flops_per_token(8) == short


def test_records_are_frozen_and_equal_by_value() -> None:
    assert make_config() == make_config()
    with pytest.raises(AttributeError):
        MOE.top_k = 3  # type: ignore[misc]
