"""Attention over packed documents: the masked call that accelerators use against one call per document."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesys.models import DocumentAttend, SoftmaxRule, compute_attention

DOCUMENT_IDS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2, 2]])
WINDOWS = [None, 1, 3, 6, 100]


def make_heads(num_kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value of two rows of ten tokens, 4 query heads of 6."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 10, heads, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (4, num_kv_heads, num_kv_heads)
    ]


def make_rule(sliding_window: int | None) -> SoftmaxRule:
    return SoftmaxRule(6**-0.5, sliding_window)


def attend_under_mask(
    attend: DocumentAttend, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None
) -> Tensor:
    return compute_attention(q, k, v, make_rule(sliding_window), attend._find_mask(q, sliding_window))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_masked_path_equals_one_call_per_document(window: int | None, num_kv_heads: int) -> None:
    attend, heads = DocumentAttend(DOCUMENT_IDS), make_heads(num_kv_heads)
    results = []
    for y in (attend_under_mask(attend, *heads, window), attend(0, *heads, make_rule(window))):
        upstream = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape)
        results.append([y.detach(), *torch.autograd.grad(y, heads, upstream)])
    for masked, each in zip(*results, strict=True):
        torch.testing.assert_close(masked, each, rtol=1e-10, atol=1e-12)


def test_one_attend_keeps_a_mask_per_window_and_dtype() -> None:
    attend = DocumentAttend(DOCUMENT_IDS)
    for dtype in (torch.float64, torch.float32):
        heads = make_heads(2, dtype)
        for window in [*WINDOWS, *WINDOWS]:
            fresh = attend_under_mask(DocumentAttend(DOCUMENT_IDS), *heads, window)
            assert torch.equal(attend_under_mask(attend, *heads, window), fresh)
    mask = attend._find_mask(heads[0], 3)
    assert attend._find_mask(heads[0], 3) is mask
    assert not torch.equal(mask, attend._find_mask(heads[0], 6))


def test_mask_hides_later_tokens_other_documents_and_what_lies_before_the_window() -> None:
    (q, _, _), ids = make_heads(2), DOCUMENT_IDS.tolist()
    visible = DocumentAttend(DOCUMENT_IDS)._find_mask(q, 3)[:, 0] == 0
    for row, documents in enumerate(ids):
        expected = [[0 <= i - j < 3 and documents[i] == documents[j] for j in range(10)] for i in range(10)]
        assert visible[row].tolist() == expected
