"""Families as data: every option there and back, every element of a model at one place in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import DENSE, MOE, make_config
from torch import Tensor

from family_keys import FAMILY_KEYS, VARIANT_KEYS
from moesys.errors import ModelFormatError
from moesys.kernels import Activation, ExpertForm
from moesys.models import (
    FAMILIES,
    Decoder,
    DecoderConfig,
    Encoding,
    Family,
    LatentAttentionConfig,
    NormConfig,
    NormKind,
    QKNorm,
    RopeConfig,
    YarnScaling,
    choose_family,
)
from moesys.moe import Capacity, MoEConfig, Normalization, Score

BY_TYPE = {family.model_type: family for family in FAMILIES}


def read(name: str, **changes: Any) -> tuple[Family, DecoderConfig]:
    keys = VARIANT_KEYS[name] | changes
    family = BY_TYPE[keys["model_type"]]
    return family, family.read_config(keys)


def find_state(model: Decoder) -> dict[str, Tensor]:
    return dict(model.state_dict())


def number_elements(model: Decoder) -> None:
    """Gives every element of the model a number of its own."""
    start = 1
    for tensor in find_state(model).values():
        tensor.copy_(torch.arange(start, start + tensor.numel(), dtype=tensor.dtype).view(tensor.shape))
        start += tensor.numel()


def make_layout_cases() -> Iterator[Any]:
    """Every variant in every way that its family stores experts."""
    for name, keys in VARIANT_KEYS.items():
        family = BY_TYPE[keys["model_type"]]
        for number, layout in enumerate(family.layout.moe or (None,)):
            chosen = family.layout if layout is None else replace(family.layout, moe=(layout,))
            yield pytest.param(name, replace(family, layout=chosen), id=f"{name}-{number}")


LAYOUTS = list(make_layout_cases())


def test_every_family_has_keys_here() -> None:
    assert FAMILY_KEYS.keys() == BY_TYPE.keys()


@pytest.mark.parametrize("name", VARIANT_KEYS)
def test_a_config_that_was_read_is_written_and_read_again(name: str) -> None:
    family, config = read(name)
    assert family.read_config(family.write_config(config)) == config
    assert family.read(VARIANT_KEYS[name]) == config
    assert family.find_misfits(config) == []


@pytest.mark.parametrize("name", VARIANT_KEYS)
def test_the_older_places_of_the_rope_are_read(name: str) -> None:
    family, config = read(name)
    keys = dict(VARIANT_KEYS[name])
    rope = dict(keys.pop("rope_parameters"))
    keys["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    keys["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    assert family.read_config(keys) == config
    keys["rope_scaling"] = {"rope_type": kind, **rope}
    assert family.read_config(keys) == config


@pytest.mark.parametrize(("name", "family"), LAYOUTS)
def test_every_element_lies_at_one_place_of_a_checkpoint(name: str, family: Family) -> None:
    _, config = read(name)
    model, other = Decoder(config).double(), Decoder(config).double()
    number_elements(model)
    stored = {entry.name: entry.collect() for entry in family.list_tensors(model)}
    assert len(stored) == len(family.list_tensors(model))
    everywhere = torch.cat([tensor.flatten() for tensor in stored.values()]).sort().values
    assert torch.equal(everywhere, torch.arange(1, everywhere.numel() + 1, dtype=torch.float64))
    assert everywhere.numel() == sum(tensor.numel() for tensor in find_state(model).values())
    with torch.no_grad():
        for entry in family.list_tensors(other):
            entry.fill(stored[entry.name])
    for label, tensor in find_state(other).items():
        assert torch.equal(tensor, find_state(model)[label]), label


@pytest.mark.parametrize(("name", "family"), LAYOUTS)
def test_the_names_in_a_checkpoint_choose_its_layout(name: str, family: Family) -> None:
    whole, config = read(name)
    model = Decoder(config)
    written = family.list_tensors(model)
    present = [
        f"{entry.name}_blocks" if entry.encoding is Encoding.MXFP4 else entry.name for entry in written
    ]
    chosen = whole.list_tensors(model, present)
    assert [(e.name, e.shape, e.encoding) for e in chosen] == [(e.name, e.shape, e.encoding) for e in written]


def test_a_tensor_of_another_shape_is_refused() -> None:
    family, config = read("qwen3_moe")
    entry = family.list_tensors(Decoder(config))[0]
    with pytest.raises(
        ModelFormatError, match=r"model.embed_tokens.weight has shape \(32, 64\), .* \(64, 32\)"
    ):
        entry.fill(torch.zeros(32, 64))


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_layers_for_further_tokens_are_ignored_with_computed_tensors(model_type: str) -> None:
    layout = BY_TYPE[model_type].layout
    present = [
        "model.layers.1.eh_proj.weight",
        "model.layers.2.eh_proj.weight",
        "model.layers.61.eh_proj.weight",
    ]
    for name in (
        "model.layers.2.eh_proj.weight",
        "model.layers.61.mlp.gate.weight",
        "model.rotary_emb.inv_freq",
    ):
        assert layout.ignores(name, 2, present)
    for name in (
        "model.layers.1.eh_proj.weight",
        "lm_head.bias",
        "model.norm.weight",
        "model.layers.3.norm.weight",
    ):
        assert not layout.ignores(name, 2, present)
    assert not BY_TYPE["llama"].layout.ignores("model.layers.2.mlp.up_proj.weight", 2, present)


@pytest.mark.parametrize(
    ("name", "missing", "expected"),
    [
        ("llama", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ("qwen3", {"head_dim": ...}, {"head_dim": 128}),
        ("qwen2_moe", {}, {"qkv_bias": True}),
        ("mistral", {"sliding_window": ...}, {"sliding_window": 4096}),
        ("mixtral", {"rope_parameters": ...}, {"rope": RopeConfig(8, 1e6)}),
        ("phimoe", {"rope_parameters": ...}, {"rope": RopeConfig(8, 1e6)}),
        ("minimax_m2", {"rope_parameters": ..., "rotary_dim": ...}, {"rope": RopeConfig(16, 5e6)}),
        ("minimax_m2", {"rope_parameters": ...}, {"rope": RopeConfig(8, 5e6)}),
        ("glm4_moe", {"rope_parameters": ...}, {"rope": RopeConfig(8)}),
        (
            "gpt_oss",
            {"rope_parameters": ...},
            {"rope": RopeConfig(8, 150000.0, YarnScaling(32.0, 4096, truncates=False))},
        ),
        (
            "gpt_oss",
            {"attention_bias": ..., "sliding_window": ...},
            {"qkv_bias": True, "sliding_window": 128},
        ),
        ("granitemoe", {"attention_multiplier": ...}, {"softmax_scale": 1.0}),
    ],
)
def test_what_a_file_leaves_out(name: str, missing: dict[str, Any], expected: dict[str, Any]) -> None:
    """``...`` stands for a key that is not there."""
    keys = {key: value for key, value in (VARIANT_KEYS[name] | missing).items() if value is not ...}
    mixer = BY_TYPE[name].read_config(keys).mixers[0]
    assert {field: getattr(mixer, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("sparse_step", "dense_ids", "moe_ids"),
    [(1, [], [0, 1, 2, 3]), (2, [], [1, 3]), (3, None, [2]), (1, [0, 3], [1, 2]), (2, [1], [3])],
)
def test_which_layers_of_a_qwen_have_experts(
    sparse_step: int, dense_ids: list[int] | None, moe_ids: list[int]
) -> None:
    changes = {"num_hidden_layers": 4, "decoder_sparse_step": sparse_step, "mlp_only_layers": dense_ids}
    for name in ("qwen2_moe", "qwen3_moe"):
        assert read(name, **changes)[1].moe_layer_ids == moe_ids


@pytest.mark.parametrize(
    ("name", "keys", "windows"),
    [
        ("qwen2_moe", {"max_window_layers": 3}, [8, None, 8, None]),
        ("qwen3", {"max_window_layers": 3}, [None, None, None, 8]),
        ("qwen3_moe", {"max_window_layers": 3}, [8, 8, 8, 8]),
        ("gpt_oss", {}, [8, None, 8, None]),
        ("mistral", {}, [8, 8, 8, 8]),
        ("mixtral", {}, [8, 8, 8, 8]),
        ("qwen2_moe", {"use_sliding_window": False}, [None] * 4),
        ("qwen3", {"use_sliding_window": False}, [None] * 4),
        ("qwen3_moe", {"use_sliding_window": False}, [None] * 4),
        *(
            (
                name,
                {"layer_types": ["full_attention", "sliding_attention"] * 2, "max_window_layers": 0},
                [None, 8, None, 8],
            )
            for name in ("qwen2_moe", "qwen3", "gpt_oss")
        ),
    ],
)
def test_which_layers_have_a_window(name: str, keys: dict[str, Any], windows: list[int | None]) -> None:
    common = {"num_hidden_layers": 4, "sliding_window": 8, "use_sliding_window": True}
    _, config = read(name, **(common | keys))
    assert [mixer.sliding_window for mixer in config.mixers] == windows


@pytest.mark.parametrize(
    ("name", "keys", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only 'silu' is"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is not supported; its angles change with the length, also those in a cache; "
            "default, linear, llama3, yarn, longrope are",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "spiral"}},
            "rope_type 'spiral' is not supported; default, linear",
        ),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn' needs the key 'factor'"),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            r"longrope needs one factor per pair of the 8 rotary dimensions \(4\), got 1",
        ),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, r"\['linear_attention'\] are not"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        (
            "deepseek_v3",
            {"num_key_value_heads": 2},
            r"num_key_value_heads \(2\) must be num_attention_heads \(4\)",
        ),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is not supported"),
        ("phimoe", {"num_experts_per_tok": 3}, r"num_experts_per_tok \(3\) must be 2"),
        (
            "minimax_m2",
            {"scoring_func": "softmax"},
            "scoring_func 'softmax' is not supported; only 'sigmoid' is",
        ),
    ],
)
def test_values_that_are_not_supported_are_named(name: str, keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(name, **keys)


@pytest.mark.parametrize("changes", [{"attn_type_list": [1, 0]}, {"shared_intermediate_size": 64}])
def test_a_minimax_with_other_layers_is_refused(changes: dict[str, Any]) -> None:
    assert read("minimax_m2", attn_type_list=[1, 1]) == read("minimax_m2")
    with pytest.raises(ModelFormatError, match=next(iter(changes))):
        read("minimax_m2", **changes)


def test_kimi_k2_is_a_deepseek_v3() -> None:
    assert "kimi_k2" in BY_TYPE["deepseek_v3"].model_types
    assert BY_TYPE["deepseek_v3"].model_type == "deepseek_v3"


PLAIN = {"qk_norm": QKNorm.NONE, "tie": False}


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        (make_config(), "qwen3_moe"),
        (make_config(feed_forwards=(MOE, MOE), **PLAIN), "mixtral"),
        (make_config(feed_forwards=(replace(MOE, weighting=Normalization.NONE),)), "qwen3_moe"),
        (make_config(feed_forwards=(MOE, MOE), qk_norm=QKNorm.WHOLE), "olmoe"),
        (make_config(feed_forwards=(DENSE, DENSE)), "qwen3"),
        (make_config(feed_forwards=(DENSE, DENSE), **PLAIN), "llama"),
        (make_config(feed_forwards=(DENSE, DENSE), sliding_window=7, **PLAIN), "mistral"),
        (replace(make_config(feed_forwards=(MOE,), **PLAIN), residual_scale=0.5), None),
        (
            make_config(
                feed_forwards=(replace(MOE, shared_intermediate_size=9, shared_expert_gate=True),),
                qkv_bias=True,
                **PLAIN,
            ),
            "qwen2_moe",
        ),
        (
            make_config(
                feed_forwards=(DENSE, replace(MOE, score=Score.SIGMOID, bias_update_rate=0.1)), **PLAIN
            ),
            "glm4_moe",
        ),
    ],
)
def test_the_family_that_holds_a_model_is_found(config: DecoderConfig, model_type: str | None) -> None:
    if model_type is None:
        with pytest.raises(ModelFormatError, match="no Hugging Face layout holds this model"):
            choose_family(config)
    else:
        assert choose_family(config).model_type == model_type


LATENT = LatentAttentionConfig(4, None, 8, 6, 4, RopeConfig(4))


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ({"score": Score.SIGMOID}, "score would be softmax, the model's is sigmoid"),
        ({"weight_scale": 2.5}, "weight_scale would be 1.0, the model's is 2.5"),
        ({"min_score": 0.1}, "min_score would be None, the model's is 0.1"),
        ({"bias_update_rate": 0.1}, "selection_bias would be False, the model's is True"),
        ({"capacity": Capacity.unbounded()}, "capacity would be None, the model's is Capacity("),
        ({"is_residual": True}, "is_residual would be False, the model's is True"),
        ({"expert_bias": True}, "expert_bias would be False, the model's is True"),
        ({"form": ExpertForm(Activation.GELU)}, "form.activation would be swiglu, the model's is gelu"),
        ({"shared_intermediate_size": 3}, "shared_intermediate_size would be 0, the model's is 3"),
        ({"router_bias": True}, "router_bias would be False, the model's is True"),
    ],
)
def test_no_family_silently_drops_an_option_of_a_layer(option: dict[str, Any], shown: str) -> None:
    for name in ("qwen3_moe", "mixtral"):
        family, config = read(name)
        layers = tuple(replace(f, **option) if isinstance(f, MoEConfig) else f for f in config.feed_forwards)
        [reason] = family.find_misfits(replace(config, feed_forwards=layers))
        assert reason.startswith(shown)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"norm": NormConfig(1e-5, NormKind.LAYER)}, "norm.kind would be rms, the model's is layer"),
        ({"residual_scale": 0.5}, "residual_scale would be 1.0, the model's is 0.5"),
        ({"embedding_scale": 0.5}, "embedding_scale would be 1.0, the model's is 0.5"),
        ({"logit_divisor": 0.5}, "logit_divisor would be 1.0, the model's is 0.5"),
        ({"head_bias": True}, "head_bias would be False, the model's is True"),
    ],
)
def test_no_family_silently_drops_an_option_of_the_decoder(changes: dict[str, Any], shown: str) -> None:
    family, config = read("mixtral")
    assert family.find_misfits(replace(config, **changes)) == [shown]


@pytest.mark.parametrize(
    ("name", "changes", "shown"),
    [
        ("mixtral", {"qk_norm": QKNorm.WHOLE}, "qk_norm would be none, the model's is whole"),
        ("mixtral", {"qkv_bias": True}, "qkv_bias would be False, the model's is True"),
        ("mixtral", {"has_sinks": True}, "has_sinks would be False, the model's is True"),
        ("mixtral", {"qkv_clip": 2.0}, "qkv_clip would be None, the model's is 2.0"),
        ("mixtral", {"softmax_scale": 2.0}, "softmax_scale would be None, the model's is 2.0"),
        ("mixtral", {"rope": RopeConfig(6)}, "rope.dim would be 8, the model's is 6"),
        ("qwen3_moe", {"output_bias": True}, "output_bias would be False, the model's is True"),
        ("llama", {"sliding_window": 5}, "sliding_window would be None, the model's is 5"),
    ],
)
def test_no_family_silently_drops_an_option_of_a_mixer(
    name: str, changes: dict[str, Any], shown: str
) -> None:
    family, config = read(name)
    mixers = tuple(replace(mixer, **changes) for mixer in config.mixers)
    assert family.find_misfits(replace(config, mixers=mixers)) == [shown]


def test_a_difference_in_one_layer_is_named_once_and_kinds_by_their_name() -> None:
    family, config = read("mixtral", num_hidden_layers=3)
    first, *others = config.mixers
    windowed = replace(config, mixers=(first, *(replace(mixer, sliding_window=5) for mixer in others)))
    assert family.find_misfits(windowed) == ["sliding_window would be None, the model's is 5"]
    dense = replace(config, feed_forwards=(*config.feed_forwards[:2], DENSE))
    assert family.find_misfits(dense) == ["feed_forward would be a MoE layer, the model's is a dense layer"]
    latent = replace(config, mixers=(first, LATENT, LATENT))
    assert family.find_misfits(latent) == [
        "mixer would be grouped-query attention, the model's is latent attention"
    ]
    assert family.find_misfits(replace(config, mixers=(LATENT,) * 3)) == [
        "its layers have grouped-query attention, the model's have latent attention"
    ]
    deepseek, latent = read("deepseek_v3")
    assert deepseek.find_misfits(replace(latent, mixers=(first,) * 2)) == [
        "its layers have latent attention, the model's have grouped-query attention"
    ]


def test_a_model_that_no_family_holds_hears_why_the_nearest_do_not() -> None:
    config = make_config(feed_forwards=(replace(MOE, num_experts=8, shared_intermediate_size=3), MOE))
    with pytest.raises(ModelFormatError) as caught:
        choose_family(config)
    assert str(caught.value).splitlines() == [
        "no Hugging Face layout holds this model; the nearest are",
        "  qwen3_moe: shared_intermediate_size would be 0, the model's is 3; num_experts would be 8, the model's is 4",
        "  mixtral: qk_norm would be none, the model's is per_head; shared_intermediate_size would be 0, the model's "
        "is 3; num_experts would be 8, the model's is 4",
        "  olmoe: qk_norm would be whole, the model's is per_head; shared_intermediate_size would be 0, the model's "
        "is 3; num_experts would be 8, the model's is 4",
    ]


def test_the_nearest_family_has_the_same_kinds_of_layers() -> None:
    dense = make_config(feed_forwards=(DENSE, replace(DENSE, bias=True)), qk_norm=QKNorm.WHOLE)
    latent = replace(make_config(feed_forwards=(DENSE, MOE)), mixers=(LATENT, LATENT))
    for config, first in ((dense, "qwen3"), (latent, "deepseek_v2")):
        with pytest.raises(ModelFormatError) as caught:
            choose_family(config)
        assert str(caught.value).splitlines()[1].startswith(f"  {first}:")
