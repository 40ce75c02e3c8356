"""RMSNorm: the closed form against torch's own, values and gradients."""

from __future__ import annotations

import pytest
import torch

from moesys.errors import ShapeError
from moesys.kernels import rms_norm
from moesys.kernels.rms_norm import closed_form, reference

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
