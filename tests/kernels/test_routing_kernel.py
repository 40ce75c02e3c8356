"""Choosing, weighing and grouping in C against the torch code of the MoE layer that specifies them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels import Kernel, use_kernel
from moesys.kernels.routing import choose_and_weigh, choose_top_k, group_by_expert, takes, weigh_choice
from moesys.moe import GroupLimitedTopK, LocalDispatcher, Routing, Threshold, TopK
from moesys.moe.selection import Selection
from moesys.moe.weighting import Normalization, compute_weights

NAN, INF = float("nan"), float("inf")


def sort_in_torch(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("num_experts", [1, 2, 7, 64])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 700])
def test_the_best_k_are_those_of_a_stable_sort(num_tokens: int, num_experts: int) -> None:
    """Scores of few distinct values, so that most are tied; enough tokens for several threads."""
    generator = torch.Generator().manual_seed(num_tokens)
    scores_TE = torch.randint(0, 6, (num_tokens, num_experts), generator=generator).float()
    for k in {1, 2, 8, num_experts} & set(range(1, num_experts + 1)):
        assert torch.equal(choose_top_k(scores_TE, k), sort_in_torch(scores_TE, k)), k


@given(st.lists(st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 1e-45, -3.5]), min_size=1, max_size=12))
def test_special_numbers_are_ordered_as_torch_orders_them(scores: list[float]) -> None:
    scores_TE = torch.tensor([scores])
    for k in range(1, len(scores) + 1):
        assert torch.equal(choose_top_k(scores_TE, k), sort_in_torch(scores_TE, k)), k


def test_strided_scores_are_read_where_they_lie() -> None:
    scores_TE = torch.rand(9, 6).t()
    assert torch.equal(choose_top_k(scores_TE, 3), sort_in_torch(scores_TE, 3))


@pytest.mark.parametrize("k", [0, 5])
def test_an_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(ShapeError, match=rf"k \({k}\) must be between 1 and the number of experts \(4\)"):
        choose_top_k(torch.rand(2, 4), k)


@given(st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=8))
def test_weights_are_scores_and_normalised_ones_sum_to_one(choices: list[list[int]]) -> None:
    ids, offsets = flatten(choices)
    scores_TE = torch.rand(len(choices), 5, generator=torch.Generator().manual_seed(len(ids)))
    expected = [float(scores_TE[t, e]) for t, experts in enumerate(choices) for e in experts]
    assert weigh_choice(scores_TE, ids, offsets, None).tolist() == expected
    shares = [
        float(scores_TE[t, e]) / sum(float(scores_TE[t, other]) for other in experts)
        for t, experts in enumerate(choices)
        for e in experts
    ]
    found = weigh_choice(scores_TE, ids, offsets, 1e-20).double()
    torch.testing.assert_close(found, torch.tensor(shares, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_sum_of_underflows_gives_small_weights_and_nan_stays() -> None:
    ids, offsets = flatten([[0, 1], [0, 1]])
    scores_TE = torch.tensor([[0.0, 1e-30], [NAN, 1.0]])
    found = weigh_choice(scores_TE, ids, offsets, 1e-20)
    torch.testing.assert_close(found, torch.tensor([0.0, 1e-10, NAN, NAN]), equal_nan=True)


def test_a_token_alone_has_the_weights_of_one_among_many() -> None:
    scores_TE = torch.rand(300, 40)
    ids_TK = choose_top_k(scores_TE, 9)
    many = weigh_choice(scores_TE, ids_TK.flatten(), torch.arange(0, 2701, 9), 1e-20).view(300, 9)
    for token in (0, 150, 299):
        alone = weigh_choice(scores_TE[token : token + 1], ids_TK[token], torch.tensor([0, 9]), 1e-20)
        assert torch.equal(alone, many[token])


@pytest.mark.parametrize("smallest_sum", [None, 1e-20])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 700])
def test_one_call_has_the_bits_of_its_steps(num_tokens: int, smallest_sum: float | None) -> None:
    """With tied scores, and a bias that changes the choice and no weight."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits_TE = torch.randint(-3, 4, (num_tokens, 40), generator=generator).float()
    scores_TE, bias_E = logits_TE.softmax(dim=1), torch.rand(40, generator=generator)
    for bias, scale in ((None, 1.0), (bias_E, 2.5), (bias_E, 0.3)):
        ids, offsets, weights_A, is_finite = choose_and_weigh(
            logits_TE, scores_TE, bias, 6, smallest_sum, scale
        )
        ids_TK = choose_top_k(scores_TE if bias is None else scores_TE + bias, 6)
        assert torch.equal(ids, ids_TK.flatten())
        assert offsets.tolist() == [6 * token for token in range(num_tokens + 1)]
        assert torch.equal(weights_A, weigh_choice(scores_TE, ids, offsets, smallest_sum) * scale)
        assert is_finite


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("token", [0, 699])
def test_one_logit_that_is_not_finite_is_seen(token: int, bad: float) -> None:
    logits_TE = torch.full((700, 40), 3e38)
    assert choose_and_weigh(logits_TE, logits_TE.sigmoid(), None, 2, None, 1.0)[3]
    logits_TE[token, 39] = bad
    assert not choose_and_weigh(logits_TE, logits_TE.sigmoid(), None, 2, None, 1.0)[3]


def test_scores_that_do_not_fit_their_logits_are_refused() -> None:
    scores = torch.rand(3, 4)
    with pytest.raises(ShapeError, match=r"k \(5\) must be between 1 and the number of experts \(4\)"):
        choose_and_weigh(scores, scores, None, 5, None, 1.0)
    for logits, bias in ((scores[:2], None), (scores, torch.rand(3))):
        with pytest.raises(
            ShapeError, match=r"shape of the scores \(3, 4\) and the bias one entry per expert"
        ):
            choose_and_weigh(logits, scores, bias, 2, None, 1.0)


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=12), st.integers(6, 9))
def test_groups_are_those_that_torch_makes(choices: list[list[int]], num_experts: int) -> None:
    ids, token_offsets = flatten(choices)
    weights_A = torch.arange(len(ids), dtype=torch.float32)
    routing = Routing(ids, weights_A, token_offsets, num_experts)
    with use_kernel(Kernel.TORCH):
        (part,) = LocalDispatcher().dispatch(torch.empty(len(choices), 2), routing)
    row_ids, offsets, sorted_A, positions = group_by_expert(ids, weights_A, token_offsets, num_experts)
    assert torch.equal(row_ids, part.rows.row_ids)
    assert torch.equal(offsets, part.rows.offsets)
    assert torch.equal(sorted_A, part.weights_A)
    assert torch.equal(positions, part.token_sum.positions)


@pytest.mark.parametrize(
    ("ids", "offsets"),
    [
        ([0, 3], [0, 1, 2]),
        ([0, -1], [0, 1, 2]),
        ([0, 1], [0, 1, 1]),
        ([0, 1], [0, 3, 2]),
        ([0, 1], [1, 1, 2]),
    ],
)
def test_indices_out_of_range_are_refused(ids: list[int], offsets: list[int]) -> None:
    message = r"expert ids must be in 0\.\.2, and the tokens' offsets must rise from 0 to .* \(2\)"
    expert_ids, token_offsets = torch.tensor(ids), torch.tensor(offsets)
    with pytest.raises(ShapeError, match=message):
        weigh_choice(torch.rand(2, 3), expert_ids, token_offsets, None)
    with pytest.raises(ShapeError, match=message):
        group_by_expert(expert_ids, torch.rand(2), token_offsets, 3)


def test_lists_of_other_lengths_are_refused() -> None:
    ids, offsets = flatten([[0, 1], [2]])
    with pytest.raises(ShapeError, match="offsets of 2 tokens do not fit scores of 3"):
        weigh_choice(torch.rand(3, 4), ids, offsets, None)
    with pytest.raises(ShapeError, match=r"one weight per expert id \(3\)"):
        group_by_expert(ids, torch.rand(4), offsets, 4)
    with pytest.raises(ShapeError, match="offsets that begin with 0"):
        group_by_expert(ids, torch.rand(3), offsets[:0], 4)


@pytest.mark.parametrize("convert", [lambda t: t.double(), lambda t: t.int(), lambda t: t.to("meta")])
def test_what_c_would_misread_is_refused(convert: Callable[[Tensor], Tensor]) -> None:
    scores, ids, offsets = torch.rand(3, 4), torch.tensor([0, 1, 2]), torch.arange(4)
    weights = scores[:, 0]
    calls = [
        lambda: choose_top_k(convert(scores), 2),
        lambda: choose_and_weigh(convert(scores), scores, None, 2, None, 1.0),
        lambda: choose_and_weigh(scores, convert(scores), None, 2, None, 1.0),
        lambda: choose_and_weigh(scores, scores, convert(scores[0]), 2, None, 1.0),
        lambda: weigh_choice(convert(scores), ids, offsets, None),
        lambda: weigh_choice(scores, convert(ids), offsets, None),
        lambda: weigh_choice(scores, ids, convert(offsets), None),
        lambda: group_by_expert(convert(ids), weights, offsets, 4),
        lambda: group_by_expert(ids, convert(weights), offsets, 4),
        lambda: group_by_expert(ids, weights, convert(offsets), 4),
    ]
    for call in calls:
        with pytest.raises(ShapeError, match=r"reads torch\.(float32|int64) on a CPU here, got"):
            call()


def test_torch_computes_what_these_do_not_take() -> None:
    scores, ids = torch.rand(2, 3), torch.zeros(2, dtype=torch.int64)
    assert takes(scores, ids)
    assert not takes(scores.double(), ids)
    assert not takes(scores, ids.int())
    assert not takes(scores.to("meta"), ids)
    assert not takes(scores.clone().requires_grad_(), ids)
    with torch.no_grad():
        assert takes(scores.clone().requires_grad_(), ids)
    with use_kernel(Kernel.TORCH):
        assert not takes(scores, ids)
    with use_kernel(Kernel.NATIVE):
        assert takes(scores, ids)
    assert not torch.func.vmap(lambda row: torch.tensor(takes(row)))(scores).any()


@pytest.mark.parametrize("weighting", Normalization)
@pytest.mark.parametrize("selection", [TopK(4), GroupLimitedTopK(4, 8, 3), Threshold(4, 0.07)])
def test_a_router_chooses_and_weighs_as_torch_does(selection: Selection, weighting: Normalization) -> None:
    logits_TE = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    scores_TE = logits_TE.softmax(dim=1)
    choice = selection.choose(scores_TE)
    weights = compute_weights(choice, logits_TE, scores_TE, weighting)
    with use_kernel(Kernel.TORCH):
        torchs = selection.choose(scores_TE)
        torchs_weights = compute_weights(torchs, logits_TE, scores_TE, weighting)
    assert torch.equal(choice.expert_ids, torchs.expert_ids)
    assert torch.equal(choice.token_offsets, torchs.token_offsets)
    torch.testing.assert_close(weights, torchs_weights, rtol=1e-6, atol=0)


def flatten(choices: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Returns the experts' ids and the tokens' offsets."""
    counts = torch.tensor([0, *(len(experts) for experts in choices)])
    ids = [expert for experts in choices for expert in experts]
    return torch.tensor(ids, dtype=torch.int64), counts.cumsum(0)
