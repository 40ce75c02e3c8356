"""Telemetry against figures computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from fake_seams import make_routing
from torch.utils._python_dispatch import TorchDispatchMode

from moesys.moe import ExpertLoad, LoadMeter


def test_figures_of_two_layers() -> None:
    meter = LoadMeter()
    certain = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2)
    undecided = torch.full((2, 4), 0.25)
    meter.add(
        {
            3: make_routing([[0, 1], [0, 2]], 4, scores_TE=certain),
            1: make_routing([[0], [1]], 2, scores_TE=None),
        }
    )
    meter.add({3: make_routing([[0, 1], [3, 0]], 4, scores_TE=undecided, dropped=[False, True, True, False])})
    load = meter.drain()
    assert load.layer_ids == [1, 3]
    assert load.expert_tokens == [[1, 1], [4, 2, 1, 1]]
    assert load.imbalance == pytest.approx((1.0 + 4 / (8 / 4)) / 2)
    assert load.entropy == pytest.approx((0 + (0 + 0 + 1 + 1) / 4) / 2)
    assert load.confidence == pytest.approx((0 + (1 + 1 + 0.25 + 0.25) / 4) / 2)
    assert load.dropped == 2


def test_entropy_of_uneven_scores() -> None:
    meter = LoadMeter()
    meter.add({0: make_routing([[0]], 3, scores_TE=torch.tensor([[0.5, 0.3, 0.2]]))})
    expected = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2)) / math.log(3)
    assert meter.drain().entropy == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tokens_with_bad_logits_spoil_no_mean_and_are_counted_as_sent(bad: float) -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2]])
    clean, mixed = LoadMeter(), LoadMeter()
    clean.add({0: make_routing([[0], [0]], 3, scores_TE=scores)})
    poisoned = torch.tensor([[bad, 0.0, 1.0], [0.1, bad, 0.0]]).softmax(-1)
    mixed.add({0: make_routing([[0], [1]], 3, scores_TE=poisoned)})
    mixed.add({0: make_routing([[0], [0], [2]], 3, scores_TE=torch.cat([scores, poisoned[:1]]))})
    expected, found = clean.drain(), mixed.drain()
    assert (found.entropy, found.confidence) == (expected.entropy, expected.confidence)
    assert found.expert_tokens == [[3, 1, 1]]


def test_a_layer_with_bad_logits_only_has_entropy_and_confidence_zero() -> None:
    meter = LoadMeter()
    meter.add({0: make_routing([[0]], 3, scores_TE=torch.full((1, 3), math.nan))})
    load = meter.drain()
    assert (load.entropy, load.confidence) == (0.0, 0.0)


def test_drain_starts_anew() -> None:
    meter = LoadMeter()
    meter.add({0: make_routing([[0], [0]], 2, dropped=[True, False])})
    meter.drain()
    assert meter.drain() == ExpertLoad([], [], 0.0, 0.0, 0.0, 0)
    meter.add({0: make_routing([[1]], 2)})
    assert meter.drain().expert_tokens == [[0, 1]]


def test_a_layer_without_tokens_and_a_layer_of_one_expert() -> None:
    meter = LoadMeter()
    meter.add(
        {
            0: make_routing([], 3, scores_TE=torch.zeros(0, 3)),
            1: make_routing([[0]], 1, scores_TE=torch.ones(1, 1)),
        }
    )
    load = meter.drain()
    assert load.expert_tokens == [[0, 0, 0], [1]]
    assert load.entropy == 0.0
    assert load.imbalance == 0.5


class _NoReads(TorchDispatchMode):
    """Fails where a number is read from a tensor, for which the host would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_add_waits_for_no_device_and_drain_adds_up_what_was_dropped() -> None:
    meter = LoadMeter()
    with _NoReads():
        for dropped in ([True, False], [True, True], None):
            first = make_routing([[0], [1]], 2, dropped=dropped, scores_TE=torch.full((2, 2), 0.5))
            meter.add({0: first, 1: make_routing([[0]], 2, dropped=[True])})
    assert meter.drain().dropped == 3 + 3
    assert meter.drain().dropped == 0


def test_statistics_keep_no_graph() -> None:
    scores = torch.full((1, 2), 0.5, requires_grad=True)
    meter = LoadMeter()
    meter.add({0: make_routing([[0]], 2, scores_TE=scores.softmax(-1))})
    assert meter.drain().confidence == pytest.approx(0.5)
