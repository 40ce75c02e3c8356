"""The rotary embedding against its specification."""

from __future__ import annotations

import pytest
import torch

from moesys.errors import ShapeError
from moesys.kernels import rotate_pairs
from moesys.kernels.rotary import reference


def make_angles(length: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(
        torch.arange(length, dtype=torch.float64), torch.linspace(0.1, 1, pairs, dtype=torch.float64)
    )
    return angles.cos()[:, None], angles.sin()[:, None]


@pytest.mark.parametrize(("length", "heads", "size"), [(1, 1, 2), (5, 3, 8), (7, 2, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_specification(length: int, heads: int, size: int, dtype: torch.dtype) -> None:
    cos, sin = (t.to(dtype) for t in make_angles(length, size // 2))
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, length, heads, size, generator=generator).to(dtype) for _ in range(2))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = rotate_pairs(ours, cos, sin), reference.rotate_pairs(theirs, cos, sin)
    y.backward(grad)
    expected.backward(grad)
    assert ours.grad is not None
    assert theirs.grad is not None
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def test_gradcheck_on_a_view() -> None:
    cos, sin = make_angles(3, 2)
    qkv = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rotate_pairs(t[:, :, 1:3], cos, sin), (qkv,))


def test_a_rotation_keeps_lengths() -> None:
    cos, sin = make_angles(6, 4)
    x = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(rotate_pairs(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def test_the_number_of_angles_must_fit() -> None:
    cos, sin = make_angles(3, 2)
    with pytest.raises(ShapeError, match="x ends in 6"):
        rotate_pairs(torch.ones(1, 3, 1, 6), cos, sin)
