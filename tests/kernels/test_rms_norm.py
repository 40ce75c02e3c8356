"""RMSNorm: the closed form against torch's own, values and gradients; the native kernel against both."""

from __future__ import annotations

import pytest
import torch

from moesys.errors import ShapeError
from moesys.kernels import Kernel, rms_norm, use_kernel
from moesys.kernels.rms_norm import closed_form, native, reference, rms_norm_pair

EPSILON = 1e-5


def run(function, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x[..., :1] *= 30
    leaf = x.to(dtype).requires_grad_()
    weight = torch.linspace(0.5, 2, shape[-1], dtype=torch.float64).to(dtype).requires_grad_()
    y = function(leaf, weight, EPSILON)
    y.backward(grad.to(dtype))
    assert leaf.grad is not None
    assert weight.grad is not None
    return {"y": y.detach(), "x": leaf.grad, "weight": weight.grad}


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 3, 4, 16), (0, 8)])
def test_equals_torch_in_float64(shape: tuple[int, ...]) -> None:
    ours, oracle = (run(f.rms_norm, torch.float64, shape) for f in (closed_form, reference))
    for name in oracle:
        torch.testing.assert_close(ours[name], oracle[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_precise_as_torch(dtype: torch.dtype) -> None:
    oracle = run(reference.rms_norm, torch.float64, (64, 48))
    ours, theirs = (run(f.rms_norm, dtype, (64, 48)) for f in (closed_form, reference))
    for name, exact in oracle.items():
        floor = torch.finfo(dtype).eps * exact.abs().max()
        error, allowed = (max((o[name].double() - exact).abs().max(), floor) for o in (ours, theirs))
        assert error <= 1.5 * allowed, name
        assert ours[name].dtype == dtype


def test_gradcheck_with_a_strided_input() -> None:
    x = torch.randn(4, 3, dtype=torch.float64).t().requires_grad_()
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: closed_form.rms_norm(x, w, EPSILON), (x, weight))


def test_a_frozen_weight_gets_no_gradient() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), EPSILON).sum().backward()
    assert x.grad is not None


def test_a_misshapen_weight_is_named() -> None:
    with pytest.raises(ShapeError, match=r"weight has shape \(3,\), x ends in 4"):
        rms_norm(torch.ones(2, 4), torch.ones(3), EPSILON)


DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 5, 7), (2, 17), (64, 48), (1, 2048), (3, 1000), (0, 8), (5, 0)]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., :1] *= 30
    return x.to(dtype), torch.linspace(0.5, 2, shape[-1]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_native_kernel_is_as_precise_as_torch(
    scale: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Of numbers to which epsilon is nothing, and of such that are small beside it."""
    x, weight = make_inputs(shape, dtype)
    x *= scale
    assert native.takes(x, weight)
    ours, theirs = rms_norm(x, weight, EPSILON), closed_form.rms_norm(x, weight, EPSILON)
    assert ours.shape == x.shape
    assert ours.dtype == dtype
    if not x.numel():
        return
    exact = reference.rms_norm(x.double(), weight.double(), EPSILON)
    floor = torch.finfo(dtype).eps * exact.abs().max()
    error, allowed = ((y.double() - exact).abs().max() for y in (ours, theirs))
    assert error <= 1.5 * max(allowed, floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 64, 1000])
def test_a_row_has_the_bits_of_itself_alone(size: int, dtype: torch.dtype) -> None:
    x, weight = make_inputs((512, size), dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            many = rms_norm(x, weight, EPSILON)
            for row in (0, 1, 255, 511):
                assert torch.equal(rms_norm(x[row], weight, EPSILON), many[row])
    finally:
        torch.set_num_threads(threads)


def test_strided_rows_and_nan_are_computed_as_they_are() -> None:
    x, _ = make_inputs((40, 24), torch.float32)
    x[3, 5] = torch.nan
    ones = torch.ones(40)
    y = rms_norm(x.t(), ones, EPSILON)
    torch.testing.assert_close(y, rms_norm(x.t().contiguous(), ones, EPSILON), rtol=0, atol=0, equal_nan=True)
    assert y.isnan().all(dim=1).nonzero().flatten().tolist() == [5]


def test_torch_computes_what_the_native_kernel_does_not_take() -> None:
    x, weight = make_inputs((2, 8), torch.float32)
    assert not native.takes(x.double(), weight.double())
    assert not native.takes(x, weight.bfloat16())
    assert not native.takes(x.to("meta"), weight.to("meta"))
    assert not native.takes(x.clone().requires_grad_(), weight)
    assert not native.takes(x, weight.clone().requires_grad_())
    assert not torch.func.vmap(lambda row: torch.tensor(native.takes(row, weight)))(x).any()
    with torch.no_grad():
        assert native.takes(x.clone().requires_grad_(), weight)
    with use_kernel(Kernel.NATIVE):
        assert native.takes(x, weight)
    with use_kernel(Kernel.TORCH):
        assert not native.takes(x, weight)
        assert torch.equal(rms_norm(x, weight, EPSILON), closed_form.rms_norm(x, weight, EPSILON))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("rows", [(1, 1), (1, 300), (2, 5), (0, 3)])
def test_a_pair_has_the_bits_of_two_norms(
    rows: tuple[int, int], groups: tuple[int, int], dtype: torch.dtype
) -> None:
    """Where the columns are a part of wider rows, as queries and keys are beside values."""
    sizes = (20, 35)
    widths = (sizes[0] * groups[0], sizes[1] * groups[1])
    x = make_inputs((*rows, sum(widths) + 9), dtype)[0][..., : sum(widths)]
    weights = (torch.rand(sizes[0]).to(dtype), torch.rand(sizes[1]).to(dtype))
    assert native.takes_pair(x, weights)
    pair = rms_norm_pair(x, weights, widths, EPSILON)
    for part, whole, weight, size in zip(
        pair.split(widths, dim=-1), x.split(widths, dim=-1), weights, sizes, strict=True
    ):
        expected = rms_norm(whole.unflatten(-1, (-1, size)), weight, EPSILON).flatten(-2)
        assert torch.equal(part, expected)
    with use_kernel(Kernel.TORCH):
        tolerance = 4 * torch.finfo(dtype).eps
        in_torch = rms_norm_pair(x, weights, widths, EPSILON)
        torch.testing.assert_close(pair, in_torch, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_gradcheck_of_a_pair(groups: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 3 * groups[0] + 2 * groups[1], dtype=torch.float64, requires_grad=True)
    weights = tuple(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (3, 2))
    widths = (3 * groups[0], 2 * groups[1])
    assert torch.autograd.gradcheck(
        lambda x, first, second: rms_norm_pair(x, (first, second), widths, EPSILON), (x, *weights)
    )


@pytest.mark.parametrize(
    ("widths", "sizes"), [((4, 4), (4, 3)), ((4, 3), (4, 3)), ((5, 3), (2, 3)), ((8, 0), (4, 0))]
)
def test_parts_that_do_not_fit_are_refused(widths: tuple[int, int], sizes: tuple[int, int]) -> None:
    weights = (torch.ones(sizes[0]), torch.ones(sizes[1]))
    with pytest.raises(ShapeError, match=r"must divide the widths .* add up to the columns of x \(8\)"):
        rms_norm_pair(torch.ones(1, 8), weights, widths, EPSILON)
