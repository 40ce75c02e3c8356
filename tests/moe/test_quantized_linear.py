"""A linear layer in int8 computes what its rounded weights say, and stands where a float one stood."""

from __future__ import annotations

import copy

import pytest
import torch

from moesys.errors import ShapeError
from moesys.kernels import Int8Product, pack_int8
from moesys.moe import Linear, SwiGLU
from moesys.moe.linear import QuantizedLinear, quantize_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [1, 64, 100])
def test_products_are_those_of_the_rounded_weights(columns: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Linear(columns, 5, bias=bias).to(dtype).requires_grad_(False)
    rounded = quantize_linear(layer)
    x = torch.randn(2, 3, columns, dtype=dtype)
    weight = pack_int8(layer.weight).unpack()
    expected = x.float() @ weight.t() + (0 if layer.bias is None else layer.bias.float())
    found = rounded(x)
    assert found.dtype == dtype
    assert found.shape == (2, 3, 5)
    torch.testing.assert_close(
        found.float(),
        expected,
        rtol=1e-5 if dtype is torch.float32 else 2e-2,
        atol=2e-2 if dtype is torch.bfloat16 else 1e-5,
    )
    assert (rounded.in_features, rounded.out_features) == (columns, 5)
    assert rounded.weight.shape == (5, columns)
    assert not list(rounded.parameters())
    assert dict(rounded.named_buffers()).keys() == {"values", "scales"} | ({"bias"} if bias else set())


def test_the_product_is_the_one_asked_for() -> None:
    torch.manual_seed(0)
    layer = Linear(128, 8, bias=False).requires_grad_(False)
    x = torch.randn(4, 128)
    one, other = (quantize_linear(layer, product)(x) for product in Int8Product)
    assert not torch.equal(one, other)
    assert (one - other).norm() / one.norm() < 0.02


def test_a_layer_without_memory_gives_its_outline() -> None:
    with torch.device("meta"):
        layer = Linear(100, 5)
    outline = quantize_linear(layer, Int8Product.W8A8)
    real = quantize_linear(Linear(100, 5), Int8Product.W8A8)
    for one, other in zip(outline.buffers(), real.buffers(), strict=True):
        assert one.is_meta
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert outline.weight.product is Int8Product.W8A8


def test_a_feed_forward_layer_does_not_know() -> None:
    torch.manual_seed(0)
    dense = SwiGLU(64, 32).requires_grad_(False)
    x = torch.randn(3, 64)
    expected = dense(x)
    dense.gate_up_proj = quantize_linear(dense.gate_up_proj)
    dense.down_proj = quantize_linear(dense.down_proj)
    assert 1e-4 < (dense(x) - expected).norm() / expected.norm() < 0.02


def test_scales_that_were_cast_are_refused() -> None:
    layer = quantize_linear(Linear(64, 5)).to(torch.bfloat16)
    with pytest.raises(ShapeError, match="float32 scales"):
        layer(torch.randn(1, 64, dtype=torch.bfloat16))


def test_the_weight_is_made_once_and_again_for_other_buffers() -> None:
    torch.manual_seed(0)
    layer, other = (quantize_linear(Linear(64, 5, bias=False)) for _ in range(2))
    x = torch.randn(1, 64)
    assert not torch.equal(layer(x), other(x))
    weight = layer.weight
    assert layer.weight is weight
    layer.load_state_dict(other.state_dict())
    assert layer.weight is weight
    assert torch.equal(layer(x), other(x))
    layer.scales = other.scales * 2
    assert layer.weight is not weight
    assert torch.equal(layer(x), 2 * other(x))
    copied = copy.deepcopy(layer)
    copied.values.zero_()
    assert torch.equal(copied(x), torch.zeros(1, 5))
    assert torch.equal(layer(x), 2 * other(x))


def test_weights_that_are_no_numbers_are_refused() -> None:
    layer = Linear(64, 5).requires_grad_(False)
    layer.weight[2, 3] = float("nan")
    with pytest.raises(ShapeError, match="NaN or Inf"):
        quantize_linear(layer)


def test_it_is_no_float_layer() -> None:
    assert not isinstance(quantize_linear(Linear(64, 5)), torch.nn.Linear)
    assert isinstance(quantize_linear(torch.nn.Linear(64, 5)), QuantizedLinear)
