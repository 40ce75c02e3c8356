"""The rotary embedding against its specification."""

from __future__ import annotations

import pytest
import torch

from moesys.errors import ShapeError
from moesys.kernels import Kernel, rotate_pairs, use_kernel
from moesys.kernels.rotary import in_place, native, reference


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


def make_heads(
    batch: int, length: int, heads: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns heads that lie apart, as between other columns of a projection, and the angles of each token."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, heads + 2, size + 3, generator=generator)[:, :, 1 : heads + 1, :size]
    angles = 100 * torch.rand(batch, length, 1, size // 2, generator=generator)
    return x, angles.cos(), angles.sin()


@pytest.mark.parametrize(
    "shape", [(1, 1, 8, 16), (1, 5, 3, 2), (2, 7, 2, 34), (3, 1, 1, 128), (1, 300, 4, 64), (1, 0, 2, 4)]
)
def test_the_native_kernel_rounds_as_torch_does(shape: tuple[int, int, int, int]) -> None:
    x, cos, sin = make_heads(*shape)
    half = x.bfloat16()
    assert native.takes(x, cos, sin)
    assert native.takes(half, cos, sin)
    exact = reference.rotate_pairs(x.double(), cos.double(), sin.double())
    torch.testing.assert_close(rotate_pairs(x, cos, sin).double(), exact, rtol=0, atol=4e-7)
    expected = in_place.rotate_pairs(half, cos.bfloat16(), sin.bfloat16())
    assert torch.equal(rotate_pairs(half, cos, sin), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_bits_of_itself_alone(dtype: torch.dtype) -> None:
    x, cos, sin = make_heads(1, 600, 3, 22)
    x = x.to(dtype)
    many = rotate_pairs(x, cos, sin)
    for token in (0, 1, 599):
        alone = slice(token, token + 1)
        assert torch.equal(rotate_pairs(x[:, alone], cos[:, alone], sin[:, alone]), many[:, alone])


def test_torch_computes_what_the_native_kernel_does_not_take() -> None:
    x, cos, sin = make_heads(2, 3, 2, 8)
    assert native.takes(x, cos, sin)
    assert not native.takes(x, cos[:1], sin[:1])
    assert not native.takes(x[0], cos[0], sin[0])
    assert not native.takes(x, cos.double(), sin.double())
    assert not native.takes(x.double(), cos, sin)
    assert not native.takes(x[:, :2].transpose(0, 1), cos[:, :2].contiguous(), sin[:, :2].contiguous())
    assert not native.takes(x.clone().requires_grad_(), cos, sin)
    assert not native.takes(x.mT.contiguous().mT, cos, sin)
    with use_kernel(Kernel.TORCH):
        assert not native.takes(x, cos, sin)
