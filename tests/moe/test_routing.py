"""The Routing record."""

from __future__ import annotations

import pytest
import torch
from fake_seams import make_routing

from moesys.errors import ShapeError
from moesys.moe import Routing


def test_weights_and_experts_must_be_flat_lists_of_one_length() -> None:
    with pytest.raises(ShapeError, match=r"expert_ids \(3,\) and weights \(2,\) must both be flat lists"):
        Routing(torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.tensor([0, 3]), 4)
    with pytest.raises(ShapeError, match=r"expert_ids \(3, 2\) and weights \(3, 2\)"):
        Routing(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), torch.tensor([0, 2, 4, 6]), 4)


def test_fixed_k_must_match_the_number_of_assignments() -> None:
    with pytest.raises(
        ShapeError, match=r"fixed_k \(2\) x tokens \(2\) must equal the number of assignments \(3\)"
    ):
        make_routing([[0, 1], [2]], 3, fixed_k=2)


@pytest.mark.parametrize("fixed_k", [None, 2])
def test_token_ids_of_equal_k(fixed_k: int | None) -> None:
    routing = make_routing([[0, 1], [2, 0], [1, 2]], 3, fixed_k=fixed_k)
    assert routing.num_tokens == 3
    assert routing.num_assignments == 6
    assert routing.compute_token_ids().tolist() == [0, 0, 1, 1, 2, 2]


def test_token_ids_of_ragged_tokens() -> None:
    assert make_routing([[], [0, 1, 2], [], [3]], 4).compute_token_ids().tolist() == [1, 1, 1, 3]


def test_token_ids_of_no_tokens() -> None:
    routing = make_routing([], 4, fixed_k=2)
    assert routing.num_tokens == 0
    assert routing.compute_token_ids().tolist() == []


def test_counts_include_dropped_assignments() -> None:
    routing = make_routing([[0, 3], [3], [3]], 5, dropped=[False, True, False, True])
    assert routing.compute_expert_counts().tolist() == [1, 0, 0, 3, 0]
    assert routing.count_dropped() == 2
    assert make_routing([[0]], 1).count_dropped() == 0
