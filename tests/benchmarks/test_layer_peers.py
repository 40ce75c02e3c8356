"""Every plain system computes the layer, and the check in front of the stopwatch refuses one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import layer_peers
from layer_peers.workload import (
    Format,
    LayerShape,
    WrongResultError,
    check_layer,
    choose_experts,
    compute_answer,
    draw_matrices,
    draw_tokens,
    draw_weights,
    find_tolerance,
    widen,
)

SHAPE = LayerShape(hidden_size=72, inner_size=24, num_experts=6, top_k=3)
PLAIN_SYSTEMS = ("moesys-torch", "loop", "loop-widened", "grouped_mm")


def _compute(system: str, kernel: str, form: Format, num_tokens: int = 16) -> float:
    weights = draw_weights(SHAPE, form, seed=0)
    x_TD = draw_tokens(num_tokens, SHAPE.hidden_size, seed=1)
    with torch.inference_mode():
        build = layer_peers.load_builder(system)
        layer = build(layer_peers.find_variant(system, kernel), weights, SHAPE.top_k)
        y_TD = layer.compute(x_TD.to(layer.activation_dtype))
    tolerance = find_tolerance(form, layer.activation_dtype, SHAPE.top_k)
    return check_layer(y_TD, x_TD, weights, SHAPE.top_k, tolerance)


@pytest.mark.parametrize("form", list(Format))
def test_our_layer_agrees_with_float64_in_every_format(form: Format) -> None:
    assert _compute("moesys", "torch", form) < 1e-2


@pytest.mark.parametrize("form", [Format.FP32, Format.BF16])
@pytest.mark.parametrize("system", PLAIN_SYSTEMS)
def test_plain_systems_agree_with_float64(system: str, form: Format) -> None:
    if form in layer_peers.SYSTEMS[system].formats:
        _compute(system, "torch", form)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_fewer_tokens_than_are_checked(num_tokens: int) -> None:
    _compute("loop", "torch", Format.FP32, num_tokens)


def _swap_halves(y_TD: Tensor, x_TD: Tensor, weights: layer_peers.LayerWeights) -> Tensor:
    gate_EFD, up_EFD = widen(weights.gate_up_EFD).chunk(2, dim=1)
    swapped = layer_peers.LayerWeights(
        weights.router_ED, torch.cat([up_EFD, gate_EFD], dim=1), weights.down_EDF
    )
    return compute_answer(x_TD, swapped, choose_experts(x_TD, weights.router_ED, SHAPE.top_k))


def _drop_last_choice(y_TD: Tensor, x_TD: Tensor, weights: layer_peers.LayerWeights) -> Tensor:
    return compute_answer(x_TD, weights, choose_experts(x_TD, weights.router_ED, SHAPE.top_k - 1))


def _lose_the_tokens(y_TD: Tensor, x_TD: Tensor, weights: layer_peers.LayerWeights) -> Tensor:
    return torch.zeros_like(y_TD)


def _break_one_number(y_TD: Tensor, x_TD: Tensor, weights: layer_peers.LayerWeights) -> Tensor:
    clearest = choose_experts(x_TD, weights.router_ED, SHAPE.top_k).margins_T.argmax()
    broken = y_TD.clone()
    broken[clearest, -1] = float("nan")
    return broken


@pytest.mark.parametrize("breakage", [_swap_halves, _drop_last_choice, _lose_the_tokens, _break_one_number])
def test_a_wrong_layer_is_refused_at_the_widest_tolerance(breakage) -> None:
    weights = draw_weights(SHAPE, Format.FP32, seed=0)
    x_TD = draw_tokens(16, SHAPE.hidden_size, seed=1)
    right_TD = compute_answer(x_TD, weights, choose_experts(x_TD, weights.router_ED, SHAPE.top_k))
    tolerance = max(
        find_tolerance(form, dtype, SHAPE.top_k)
        for form in Format
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert check_layer(right_TD, x_TD, weights, SHAPE.top_k, tolerance) == 0
    with pytest.raises(WrongResultError, match="differs from float64"):
        check_layer(breakage(right_TD, x_TD, weights), x_TD, weights, SHAPE.top_k, tolerance)


def test_matrices_have_the_format_and_no_two_equal_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    for form in Format:
        weight = draw_matrices((3, 5, 130), form, generator)
        assert weight.shape == (3, 5, 130)
        rows = widen(weight)
        assert rows.flatten(0, 1).unique(dim=0).shape[0] == 15
        assert 0.8 < float(rows.std()) * 130**0.5 < 1.2


def test_int8_weights_are_refused_by_systems_without_the_format() -> None:
    weights = draw_weights(SHAPE, Format.W8, seed=0)
    with pytest.raises(layer_peers.UnavailableError, match="no int8 format"):
        layer_peers.load_builder("loop")("as-held", weights, SHAPE.top_k)


def test_a_system_whose_package_is_absent_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = layer_peers.System("tutel_layer", "dropless", "no_such_package")
    monkeypatch.setitem(layer_peers.SYSTEMS, "tutel", absent)
    with pytest.raises(layer_peers.UnavailableError, match="no_such_package is not installed"):
        layer_peers.load_builder("tutel")
