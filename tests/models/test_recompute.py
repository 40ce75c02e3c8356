"""Recomputation replays routing, changes no bit, and counts nothing twice (law 6)."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from small_models import DENSE, MOE, make_config, make_model, make_positions, make_tokens
from torch import Tensor

from moesys.kernels import linear_cross_entropy
from moesys.models import DocumentAttend
from moesys.moe import ExpertLoad, LoadMeter, compute_balance_loss, selection

CONFIG = make_config(feed_forwards=(MOE, DENSE, MOE))


class Step(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]
    load: ExpertLoad


def run_step(*, recompute: bool, dtype: torch.dtype = torch.float32) -> Step:
    model = make_model(CONFIG, dtype=dtype)
    tokens, meter = make_tokens(2, 9), LoadMeter()
    execution = model.make_resident_execution(recompute=recompute)
    output = model(tokens[:, :-1], make_positions(2, 8), DocumentAttend(None), execution)
    hidden_TD = output.hidden_BSD.flatten(0, 1)
    loss = linear_cross_entropy(hidden_TD, model.head_weight_VD, tokens[:, 1:].flatten(), 5)
    loss = loss + sum(compute_balance_loss(routing) for routing in output.routings.values())
    meter.add(output.routings)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return Step(loss.detach(), gradients, meter.drain())


def assert_same_bits(first: Step, second: Step) -> None:
    assert torch.equal(first.loss, second.loss)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_recompute_changes_no_bit(dtype: torch.dtype) -> None:
    kept, recomputed = (run_step(recompute=r, dtype=dtype) for r in (False, True))
    assert_same_bits(kept, recomputed)


def test_load_is_counted_once() -> None:
    kept, recomputed = (run_step(recompute=r) for r in (False, True))
    assert kept.load == recomputed.load
    assert [sum(counts) for counts in recomputed.load.expert_tokens] == [2 * 16, 2 * 16]


def test_routing_is_replayed_where_choosing_again_would_flip(monkeypatch: pytest.MonkeyPatch) -> None:
    """As near-tied scores would: every choice after the forward pass comes out as other experts."""
    choose, num_calls = selection.choose_top_k, 0

    def choose_and_flip_later(scores_TE: Tensor, top_k: int) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        best_first = choose(scores_TE, scores_TE.shape[1])
        return best_first[:, :top_k] if num_calls <= 2 else best_first[:, -top_k:]

    kept = run_step(recompute=False)
    monkeypatch.setattr(selection, "choose_top_k", choose_and_flip_later)
    recomputed = run_step(recompute=True)
    assert_same_bits(kept, recomputed)
    assert num_calls == 2
    flipped = run_step(recompute=False)
    assert not torch.equal(flipped.loss, kept.loss)


def test_blocks_run_twice_only_when_recomputing() -> None:
    for recompute, expected in ((False, 1), (True, 2)):
        model = make_model(CONFIG)
        calls: list[int] = []
        model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        execution = model.make_resident_execution(recompute=recompute)
        model(
            make_tokens(1, 4), make_positions(1, 4), DocumentAttend(None), execution
        ).hidden_BSD.sum().backward()
        assert len(calls) == expected
