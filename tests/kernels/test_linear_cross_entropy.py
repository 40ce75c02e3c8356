"""The fused output head and loss against its reference, which holds all logits (law 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from expert_cases import assert_numeric
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesys.errors import ShapeError
from moesys.kernels import linear_cross_entropy
from moesys.kernels.cross_entropy import reference

TARGETS = torch.tensor([3, -100, 0, 10, -100, 5, 5, 1, 2, 9, -100, 7, 0])


class Result(NamedTuple):
    loss: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


def make_inputs(num_tokens: int = 13, vocab: int = 11, hidden: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64),
        torch.randn(vocab, hidden, generator=generator, dtype=torch.float64),
    )


def run(
    compute: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
) -> Result:
    hidden, weight = (t.detach().to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
    loss = compute(hidden, weight)
    (loss * scale).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    return Result(loss.detach(), hidden.grad, weight.grad)


@pytest.mark.parametrize("scale", [1.0, -0.37])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 13, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_reference(dtype: torch.dtype, chunk_tokens: int, scale: float) -> None:
    hidden, weight = (t.to(dtype) for t in make_inputs())
    oracle = run(
        lambda h, w: reference.linear_cross_entropy(h, w, TARGETS), hidden, weight, torch.float64, scale
    )
    actual = run(lambda h, w: linear_cross_entropy(h, w, TARGETS, chunk_tokens), hidden, weight, dtype, scale)
    for name, got, expected in zip(Result._fields, actual, oracle, strict=True):
        assert_numeric(got, expected, name)


def test_reference_equals_the_formula() -> None:
    hidden, weight = make_inputs()
    expected = sum(
        torch.logsumexp(hidden[t] @ weight.T, 0) - hidden[t] @ weight[target]
        for t, target in enumerate(TARGETS.tolist())
        if target >= 0
    )
    assert_numeric(reference.linear_cross_entropy(hidden, weight, TARGETS), torch.as_tensor(expected), "loss")


def test_gradcheck() -> None:
    hidden, weight = (t.requires_grad_() for t in make_inputs(5, 4, 3))
    targets = torch.tensor([3, -100, 0, 1, 3])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, 2) * 0.5, (hidden, weight)
    )


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1 / 4095])
def test_bf16_error_is_at_most_that_of_plain_bf16_times_1_5(scale: float) -> None:
    hidden, weight = (t.bfloat16() for t in make_inputs(256, 300, 64))
    targets = torch.randint(0, 300, (256,), generator=torch.Generator().manual_seed(2))
    targets[::9] = -100
    oracle = run(
        lambda h, w: reference.linear_cross_entropy(h, w, targets), hidden, weight, torch.float64, scale
    )
    plain = run(
        lambda h, w: reference.linear_cross_entropy(h, w, targets), hidden, weight, torch.bfloat16, scale
    )
    actual = run(lambda h, w: linear_cross_entropy(h, w, targets, 64), hidden, weight, torch.bfloat16, scale)
    assert actual.loss.dtype == torch.float32
    for name, got, limit, expected in zip(Result._fields, actual, plain, oracle, strict=True):
        error = (got.double() - expected).norm()
        assert error <= 1.5 * (limit.double() - expected).norm() + 1e-7 * expected.norm(), name


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_without_targets_loss_and_gradients_are_zero(num_tokens: int) -> None:
    hidden, weight = make_inputs(num_tokens)
    targets = torch.full((num_tokens,), -100)
    result = run(lambda h, w: linear_cross_entropy(h, w, targets, 3), hidden, weight, torch.float32)
    assert not any(t.any() for t in result)


def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight = make_inputs()
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, TARGETS, 4).backward()
    oracle = run(lambda h, w: reference.linear_cross_entropy(h, w, TARGETS), hidden, weight, torch.float64)
    assert hidden.grad is not None
    assert_numeric(hidden.grad, oracle.grad_hidden, "hidden")
    assert weight.grad is None


class _CountProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "mm" in func.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_gradients_each_chunk_is_one_product(requires_grad: bool) -> None:
    hidden, weight = (t.requires_grad_(requires_grad) for t in make_inputs())
    with torch.no_grad(), _CountProducts() as products:
        loss = linear_cross_entropy(hidden, weight, TARGETS, 5)
    assert not loss.requires_grad
    assert_numeric(loss, reference.linear_cross_entropy(hidden, weight, TARGETS).detach(), "loss")
    assert products.count == 3


def test_shape_errors_tell_rule_and_values() -> None:
    hidden, weight = make_inputs()
    with pytest.raises(ShapeError, match=r"hidden \(13, 6\) and weight \(11, 5\) must be"):
        linear_cross_entropy(hidden, weight[:, :5], TARGETS, 4)
    with pytest.raises(ShapeError, match=r"hidden \(1, 13, 6\)"):
        linear_cross_entropy(hidden[None], weight, TARGETS, 4)
    with pytest.raises(ShapeError, match=r"one target per token: 13 tokens, targets \(12,\)"):
        linear_cross_entropy(hidden, weight, TARGETS[:-1], 4)


def test_target_outside_the_vocabulary_is_an_error() -> None:
    hidden, weight = make_inputs()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, TARGETS.clamp(max=4) + 7, 4)


def test_negative_target_other_than_ignored_is_an_error() -> None:
    hidden, weight = make_inputs()
    with pytest.raises((ShapeError, IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, TARGETS.where(TARGETS != -100, -1), 4)


@pytest.mark.parametrize("chunk_tokens", [0, -1])
def test_chunk_must_be_positive(chunk_tokens: int) -> None:
    with pytest.raises(ShapeError, match="chunk_tokens"):
        linear_cross_entropy(*make_inputs(), TARGETS, chunk_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 5, 64, 1000, 4097])
def test_log_softmax_may_write_over_its_input(dtype: torch.dtype, vocab_size: int) -> None:
    """The chunked kernel relies on it; torch does not promise it."""
    logits = torch.randn(7, vocab_size, dtype=dtype)
    expected = torch.log_softmax(logits, dim=1)
    assert torch.equal(torch.log_softmax(logits, dim=1, out=logits), expected)
