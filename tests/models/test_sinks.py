"""Attention sinks against a softmax with one more logit, written out; values and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesys.models import DocumentAttend, SoftmaxRule, compute_attention
from moesys.models.attend import attend_causally

HEADS, LENGTH, SIZE = 4, 9, 6
WINDOWS = [None, 1, 3, 100]


def make_heads(num_kv_heads: int, value_dim: int = SIZE) -> list[Tensor]:
    """Query, key, value and sinks, two rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (2, LENGTH, HEADS, SIZE),
        (2, LENGTH, num_kv_heads, SIZE),
        (2, LENGTH, num_kv_heads, value_dim),
        (HEADS,),
    ]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()
        for shape in shapes
    ]


def see(window: int | None, queries: range, keys: range) -> Tensor:
    """(queries, keys) bool."""
    return torch.tensor([[0 <= i - j < (window or LENGTH) for j in keys] for i in queries])


def attend_slowly(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float, visible: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    extra = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.arange(found.numel(), dtype=torch.float64).cos().view(found.shape)
    gradients = [torch.autograd.grad(y, inputs, upstream, retain_graph=True) for y in (found, expected)]
    for got, want in zip(*gradients, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value_dim", [SIZE, 4, 9])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_causal_attention(window: int | None, num_kv_heads: int, value_dim: int) -> None:
    q, k, v, sinks = make_heads(num_kv_heads, value_dim)
    found = attend_causally(q, k, v, SoftmaxRule(0.3, window, sinks))
    everything = range(LENGTH)
    expected = attend_slowly(q, k, v, sinks, 0.3, see(window, everything, everything))
    assert_same(found, expected, [q, k, v, sinks])


@pytest.mark.parametrize("window", WINDOWS)
def test_packed_documents(window: int | None) -> None:
    q, k, v, sinks = make_heads(2)
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2, 2]])
    visible = see(window, range(LENGTH), range(LENGTH)) & (ids[:, None, :, None] == ids[:, None, None, :])
    attend, rule = DocumentAttend(ids), SoftmaxRule(0.3, window, sinks)
    expected = attend_slowly(q, k, v, sinks, 0.3, visible)
    assert_same(attend(0, q, k, v, rule), expected, [q, k, v, sinks])
    masked = compute_attention(q, k, v, rule, attend._find_mask(q, window))
    assert_same(masked, expected, [q, k, v, sinks])


@pytest.mark.parametrize("num_queries", [1, 4])
def test_new_tokens_over_a_cache(num_queries: int) -> None:
    """One token sees every key without a mask; several see them under one."""
    q, k, v, sinks = make_heads(2)
    q = q[:, -num_queries:]
    visible = see(None, range(LENGTH - num_queries, LENGTH), range(LENGTH))
    mask = None if num_queries == 1 else torch.zeros(visible.shape).double().masked_fill(~visible, -torch.inf)
    found = compute_attention(q, k, v, SoftmaxRule(0.3, None, sinks), mask)
    assert_same(found, attend_slowly(q, k, v, sinks, 0.3, visible), [q, k, v, sinks])


def test_a_sink_of_minus_infinity_takes_nothing_and_a_high_one_everything() -> None:
    q, k, v, sinks = make_heads(2)
    plain = attend_causally(q, k, v, SoftmaxRule(0.3))
    low = attend_causally(q, k, v, SoftmaxRule(0.3, None, torch.full_like(sinks, -1e4)))
    torch.testing.assert_close(low, plain, rtol=1e-10, atol=1e-12)
    high = attend_causally(q, k, v, SoftmaxRule(0.3, None, torch.full_like(sinks, 1e4)))
    assert not high.any()


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])], ids=["plain", "sinks"])
def test_values_may_be_narrower_or_wider_than_keys(sinks: Tensor | None) -> None:
    q, k, v, _ = make_heads(2)
    rule = SoftmaxRule(0.3, None, None if sinks is None else sinks.double())
    whole = attend_causally(q, k, v, rule)
    narrow = attend_causally(q, k, v[..., :4], rule)
    torch.testing.assert_close(narrow, whole[..., :4], rtol=1e-10, atol=1e-12)
    wide = attend_causally(q, k, torch.cat([v, v.flip(-1)], -1), rule)
    flipped = attend_causally(q, k, v.flip(-1), rule)
    torch.testing.assert_close(wide, torch.cat([whole, flipped], -1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_rows_are_independent_of_their_neighbours(window: int | None) -> None:
    q, k, v, sinks = (tensor.detach() for tensor in make_heads(2))
    rule = SoftmaxRule(0.3, window, sinks)
    both = attend_causally(q, k, v, rule)
    q[1], k[1], v[1] = torch.nan, torch.inf, torch.nan
    torch.testing.assert_close(attend_causally(q, k, v, rule)[0], both[0], rtol=1e-10, atol=1e-12)
    q[0, 5:], k[0, 5:], v[0, 5:] = torch.nan, torch.nan, torch.nan
    earlier = attend_causally(q[:1, :5], k[:1, :5], v[:1, :5], rule)
    torch.testing.assert_close(earlier[0], both[0, :5], rtol=1e-10, atol=1e-12)
