"""The tape that replays what a routing decided."""

from __future__ import annotations

import pytest
import torch
from fake_seams import make_routing

from moesys.moe import RoutingTape


def test_tape_replays_what_the_forward_pass_recorded_and_only_then() -> None:
    tape = RoutingTape()
    first = make_routing([[1, 0], [2]], 3, dropped=[False, True, False])
    forward, recompute = tape.make_contexts()
    with forward:
        assert tape.replayed is None
        tape.record(first)
    with recompute:
        tape.record(make_routing([[2], [0, 1]], 3))
        assert tape.replayed is not None
        assert tape.replayed.choice.expert_ids is first.expert_ids
        assert torch.equal(tape.replayed.choice.token_offsets, torch.tensor([0, 2, 3]))
        assert tape.replayed.dropped is first.dropped
    assert tape.replayed is None


def test_tape_stops_replaying_when_the_recomputation_is_cut_short() -> None:
    tape = RoutingTape()
    tape.record(make_routing([[0]], 1))
    _, recompute = tape.make_contexts()
    with pytest.raises(KeyError), recompute:
        raise KeyError
    assert tape.replayed is None
