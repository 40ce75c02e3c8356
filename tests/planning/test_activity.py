"""What a token does, against the model's own counts and by hand."""

from __future__ import annotations

import pytest

from family_keys import VARIANT_KEYS
from model_folders import find_family
from moesys.models import AttentionConfig, DecoderConfig, LatentAttentionConfig, RopeConfig
from moesys.models.visible_keys import compute_mean_visible_keys
from moesys.moe import MoEConfig
from moesys.planning.activity import Activity, RoutedLayer, find_weight_format, make_activity
from moesys.planning.ceilings import WeightFormat
from moesys.planning.footprint import Footprint


def read_config(name: str) -> DecoderConfig:
    return find_family(VARIANT_KEYS[name]).read_config(VARIANT_KEYS[name])


def count_layer_weights(layer: MoEConfig, config: DecoderConfig) -> int:
    return (1 + layer.form.num_halves) * config.hidden_size * layer.intermediate_size


def make_of(config: DecoderConfig) -> Activity:
    routed = [layer for layer in config.feed_forwards if isinstance(layer, MoEConfig)]
    sizes = [2 * count_layer_weights(layer, config) for layer in routed]
    sections = tuple(
        size for size, layer in zip(sizes, routed, strict=True) for _ in range(layer.num_experts)
    )
    return make_activity(config, Footprint(1000, sections, 1), sizes, lookup_bytes=100)


@pytest.mark.parametrize("name", VARIANT_KEYS)
def test_operations_are_a_third_of_the_trainings(name: str) -> None:
    """Training counts 6 for what a forward pass counts 2, at any context; but for attention, which takes another form
    where keys are kept."""
    config = read_config(name)
    activity = make_of(config)
    for context in (1, 40):
        trained = sum(mixer.count_products(context) for mixer in config.mixers)
        flops = activity.core_flops + activity.head_flops + activity.count_expert_flops(1) + 2 * trained
        assert flops == pytest.approx(config.compute_training_flops_per_token(context) / 3)


@pytest.mark.parametrize("name", VARIANT_KEYS)
def test_attention_is_counted_in_the_form_that_keeps_keys(name: str) -> None:
    """Every head takes all of what one of its keys keeps for its scores, and for its values as much as it gives."""
    config = read_config(name)
    expected = 0.0
    for mixer in config.mixers:
        visible = compute_mean_visible_keys(mixer.sliding_window, 40)
        if isinstance(mixer, LatentAttentionConfig):
            expected += mixer.num_heads * (mixer.cached[0].size + mixer.latent_rank) * visible
        else:
            assert isinstance(mixer, AttentionConfig)
            expected += mixer.num_heads * sum(part.size for part in mixer.cached) * visible
    assert make_of(config).count_attention_flops(3, 40) == pytest.approx(3 * 2 * expected)


def test_latents_of_deepseek_v3_take_3_4_times_the_products_of_expanded_keys() -> None:
    mixer = LatentAttentionConfig(128, 1536, 512, 128, 128, RopeConfig(64))
    assert mixer.count_cached_products(9) / mixer.count_products(9) == pytest.approx(
        (576 + 512) / (192 + 128)
    )


@pytest.mark.parametrize("name", VARIANT_KEYS)
def test_a_token_touches_its_experts_and_many_touch_all(name: str) -> None:
    activity = make_of(read_config(name))
    assert activity.core_bytes == 900
    for layer in activity.layers:
        assert layer.count_touched(1) == pytest.approx(layer.top_k)
        assert layer.count_touched(10_000) == pytest.approx(layer.num_experts)
    once = sum(layer.top_k * layer.expert_bytes for layer in activity.layers)
    assert activity.count_expert_bytes(1) == pytest.approx(once)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_tokens", "touched"),
    [(128, 8, 4, 29.1), (256, 8, 4, 30.5), (8, 2, 4, 5.5), (128, 8, 32, 0.87 * 128)],
)
def test_touched_experts_are_those_of_independent_choices(
    num_experts: int, top_k: int, num_tokens: int, touched: float
) -> None:
    layer = RoutedLayer(num_experts, top_k, 1, 1.0)
    assert layer.count_touched(num_tokens) == pytest.approx(touched, rel=0.01)


@pytest.mark.parametrize(("bytes_per_weight", "form"), [(4, WeightFormat.FP32), (2, WeightFormat.BF16)])
def test_a_model_without_experts_has_the_format_of_its_other_weights(
    bytes_per_weight: int, form: WeightFormat
) -> None:
    config = read_config("qwen3")
    assert not config.moe_layer_ids
    core_bytes = bytes_per_weight * config.num_matmul_parameters_per_token
    activity = make_activity(config, Footprint(core_bytes + 77, (), 1), [], lookup_bytes=77)
    assert activity.weight_format is form
    assert activity.num_experts == activity.count_expert_bytes(1) == 0


@pytest.mark.parametrize(
    ("num_bytes", "form"),
    [
        (1062, WeightFormat.INT8),
        (2000, WeightFormat.BF16),
        (2010, WeightFormat.BF16),
        (4000, WeightFormat.FP32),
    ],
)
def test_the_format_is_told_by_bytes_per_weight(num_bytes: int, form: WeightFormat) -> None:
    assert find_weight_format(num_bytes, 1000) is form
