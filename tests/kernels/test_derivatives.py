"""Forward-mode derivatives and `torch.func` through operators whose fast kernels know neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expert_cases import MIXED, Case, compute, make_case
from torch import Tensor
from torch.autograd import forward_ad

from moesys.errors import KernelError
from moesys.kernels import Int8Product, Kernel, linear, native, pack_int8
from moesys.kernels.products import api as products

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.fixture(autouse=True, params=["torch's product", "our product"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    is_ours = request.param == "our product"
    monkeypatch.setattr(products, "_prefers_native", lambda wish: is_ours)


def differentiate(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    with torch.no_grad(), forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    assert derivative is not None
    return derivative


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_linear_keeps_the_tangent_of_each_argument() -> None:
    x, weight, bias = torch.randn(5, 70), torch.randn(40, 70), torch.randn(40)
    for tensor, function, derivative in (
        (x, lambda t: linear(t, weight, bias), lambda d: d @ weight.t()),
        (weight, lambda t: linear(x, t, bias), lambda d: x @ d.t()),
        (bias, lambda t: linear(x, weight, t), lambda d: d.expand(5, 40)),
    ):
        tangent = torch.randn_like(tensor)
        assert_close(differentiate(function, tensor, tangent), derivative(tangent))


@pytest.mark.parametrize("int8_product", Int8Product)
def test_int8_weights_differentiate_as_if_nothing_was_rounded(int8_product: Int8Product) -> None:
    weight = pack_int8(torch.randn(40, 70), int8_product)
    x, tangent = torch.randn(5, 70), torch.randn(5, 70)
    expected = tangent @ weight.unpack().t()
    assert_close(differentiate(lambda t: linear(t, weight), x, tangent), expected)
    assert_close(torch.func.jvp(lambda t: linear(t, weight), (x,), (tangent,))[1], expected)


def test_a_native_kernel_refuses_a_tangent() -> None:
    x, weight = torch.randn(5, 70), torch.randn(40, 70)
    with pytest.raises(KernelError, match=r"knows no tangents .*; choose auto, torch, reference"):
        differentiate(lambda t: linear(t, weight, kernel=Kernel.NATIVE), x, x)


def test_transforms_of_torch_func_reach_through_linear() -> None:
    x, weight = torch.randn(3, 5, 70), torch.randn(40, 70)
    with torch.no_grad():
        batched = torch.func.vmap(lambda t: linear(t, weight))(x)
        assert_close(batched, x @ weight.t())
        gradient = torch.func.grad(lambda w: linear(x, w).square().sum())(weight)
    watched = weight.clone().requires_grad_()
    linear(x, watched).square().sum().backward()
    assert watched.grad is not None
    assert_close(gradient, watched.grad)


def test_int8_weights_can_be_batched_over_unless_values_decide() -> None:
    x, weight = torch.randn(3, 5, 70), pack_int8(torch.randn(40, 70))
    assert_close(torch.func.vmap(lambda t: linear(t, weight))(x), x @ weight.unpack().t())
    rounding = pack_int8(weight.unpack(), Int8Product.W8A8)
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        torch.func.vmap(lambda t: linear(t, rounding))(x)


CASES = {
    "plain": {},
    "biases": {"bias": True},
    "adapters": {"rank": 2},
}


def compute_from(case: Case, name: str, *, summed: bool) -> Callable[[Tensor], Tensor]:
    return lambda tensor: compute(
        case.with_leaves(case.list_leaves() | {name: tensor}), Kernel.AUTO, summed=summed
    )


@pytest.mark.parametrize("summed", [False, True], ids=["rows", "summed"])
@pytest.mark.parametrize("options", CASES)
def test_experts_keep_the_tangent_of_every_input(options: str, summed: bool) -> None:
    """Against the vector-Jacobian product of the same call: v . (J t) = (J^T v) . t."""
    case = make_case(*MIXED, **CASES[options])  # pyrefly: ignore
    for name, leaf in case.list_leaves().items():
        generator = torch.Generator().manual_seed(1)
        tangent = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        single, wide = case.to(torch.float32), leaf.clone().requires_grad_()
        forward = differentiate(
            compute_from(single, name, summed=summed), leaf.float(), tangent.float()
        ).double()
        y = compute_from(case, name, summed=summed)(wide)
        upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(y, wide, upstream)
        expected = (gradient * tangent).sum()
        assert ((upstream * forward).sum() - expected).abs() <= 1e-4 * (gradient * tangent).abs().sum(), name


def test_experts_compute_under_torch_func() -> None:
    case = make_case(*MIXED, dtype=torch.float32)
    batch = torch.stack([case.x_RD, 2 * case.x_RD, -case.x_RD])
    function = compute_from(case, "x", summed=True)
    with torch.no_grad():
        assert_close(torch.func.vmap(function)(batch), torch.stack([function(x) for x in batch]))
    tangent = torch.ones_like(case.x_RD)
    assert_close(
        torch.func.jvp(function, (case.x_RD,), (tangent,))[1], differentiate(function, case.x_RD, tangent)
    )


def test_linear_without_bias_keeps_tangents_and_batches() -> None:
    """The form of a decoded token, which native computes after one look."""
    x, weight = torch.randn(1, 70), torch.randn(40, 70)
    d = torch.randn_like(weight)
    assert_close(differentiate(lambda t: linear(x, t), weight, d), x @ d.t())
    assert_close(differentiate(lambda t: linear(t, weight), x, x), x @ weight.t())
    rows = torch.randn(3, 1, 70)
    with torch.no_grad():
        assert_close(torch.func.vmap(lambda row: linear(row, weight))(rows), rows @ weight.t())


def test_native_computes_for_those_who_ask_for_no_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Being inside a dual level changes nothing for tensors without a tangent."""
    calls: list[int] = []
    compute_linear = native.compute_linear
    monkeypatch.setattr(native, "compute_linear", lambda *args: (calls.append(1), compute_linear(*args))[1])
    with forward_ad.dual_level(), torch.no_grad():
        linear(torch.randn(2, 8), torch.randn(3, 8))
    assert calls == [1]
