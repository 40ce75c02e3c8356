"""Attention of few queries, and values that are part of the keys, against a softmax written out; what is copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesys.models import SoftmaxRule, compute_attention
from moesys.models.softmax_attention import FEW_QUERIES

HEADS, KEYS, SIZE, NARROW = 4, 20, 6, 5
QUERIES = [1, 3, FEW_QUERIES, FEW_QUERIES + 1, KEYS]


def make_heads(num_queries: int, num_kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and sinks, two rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, num_queries, HEADS, SIZE), (2, KEYS, num_kv_heads, SIZE), (HEADS,)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).mul_(2).to(dtype).requires_grad_()
        for shape in shapes
    ]


def make_mask(num_queries: int, window: int = KEYS) -> Tensor:
    """The last queries of all, each seeing ``window`` keys."""
    distance = torch.arange(KEYS - num_queries, KEYS)[:, None] - torch.arange(KEYS)
    return (
        torch.zeros(num_queries, KEYS).double().masked_fill((distance < 0) | (distance >= window), -torch.inf)
    )


def attend_slowly(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None, mask: Tensor
) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1)[..., :KEYS], v)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("num_queries", QUERIES)
@pytest.mark.parametrize("has_values", [False, True], ids=["values in keys", "values"])
@pytest.mark.parametrize("visible", ["all", "mask", "window", "causal"])
def test_equals_the_formula(
    visible: str, has_values: bool, num_queries: int, num_kv_heads: int, has_sinks: bool
) -> None:
    q, k, sinks = make_heads(num_queries, num_kv_heads)
    v = k.flip(1).detach().requires_grad_() if has_values else None
    masks = {"mask": make_mask(num_queries), "window": make_mask(num_queries, 3)}
    rule = SoftmaxRule(0.3, None, sinks if has_sinks else None, None if has_values else NARROW)
    shown = masks.get(visible, torch.zeros(1, 1).double())
    if visible == "causal":
        shown = (
            torch.zeros(num_queries, KEYS)
            .double()
            .masked_fill(torch.ones(num_queries, KEYS).bool().triu(1), -torch.inf)
        )
    found = compute_attention(q, k, v, rule, masks.get(visible), is_causal=visible == "causal")
    values = k[..., :NARROW] if v is None else v
    expected = attend_slowly(q, k, values, 0.3, rule.sinks_H, shown)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    inputs = [tensor for tensor in (q, k, v, rule.sinks_H) if tensor is not None]
    upstream = torch.arange(found.numel(), dtype=torch.float64).cos().view(found.shape)
    gradients = [torch.autograd.grad(y, inputs, upstream) for y in (found, expected)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("num_queries", [1, FEW_QUERIES])
def test_bfloat16_is_rounded_at_the_end_alone(num_queries: int) -> None:
    q, k, sinks = (tensor.detach() for tensor in make_heads(num_queries, 2, torch.bfloat16))
    rule = SoftmaxRule(0.3, None, sinks, NARROW)
    found = compute_attention(q, k, None, rule, make_mask(num_queries).bfloat16())
    exact = attend_slowly(
        q.double(), k.double(), k[..., :NARROW].double(), 0.3, sinks.double(), make_mask(num_queries)
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


class LargestNew(TorchDispatchMode):
    """Remembers the elements of the largest tensor that an operation made in memory of its own."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.num_elements = max(self.num_elements, result.numel())
        return result


@pytest.mark.parametrize("has_values", [False, True], ids=["values in keys", "values"])
@pytest.mark.parametrize("sinks", [None, torch.zeros(HEADS)], ids=["plain", "sinks"])
def test_one_token_copies_no_keys(sinks: Tensor | None, has_values: bool) -> None:
    """As a cache holds them: the tokens' heads beside each other."""
    q, k = torch.randn(1, 1, HEADS, 64), torch.randn(1000, 2, 64)[None]
    v = torch.randn(1000, 2, 64)[None] if has_values else None
    rule = SoftmaxRule(0.3, None, sinks, None if has_values else 48)
    with LargestNew(q, k, *([v] if v is not None else [])) as seen:
        compute_attention(q, k, v, rule, None)
    assert 0 < seen.num_elements <= 2 * HEADS * 1000


def test_values_in_keys_are_not_copied_for_many_queries() -> None:
    q, k = torch.randn(1, 32, HEADS, 64), torch.randn(1000, 1, 64)[None]
    with LargestNew(q, k) as seen:
        compute_attention(q, k, None, SoftmaxRule(0.3, value_size=48), torch.zeros(32, 1000))
    assert 0 < seen.num_elements < k.numel()
