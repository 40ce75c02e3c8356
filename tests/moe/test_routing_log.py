"""Recorded routing: what was routed, as it was routed, through a file and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_seams import make_routing
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from moesys.errors import DataError
from moesys.moe import Execution, LocalDispatcher, MoEConfig, MoELayer, ResidentSource
from moesys.moe.routing_log import RoutingLog, RoutingRecorder


@pytest.fixture(autouse=True)
def _torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on the kernel, and the native one takes a while to build."""
    monkeypatch.setenv("MOESYS_KERNEL", "torch")


class Silent:
    """A source that does nothing."""

    def hint(self, layer_id: int, routing: object) -> None: ...

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[None]:
        yield from ()

    def release(self, layer_id: int, view: object) -> None: ...


def make_log(tables: dict[int, list[list[int]]], steps: list[int], num_experts: int = 8) -> RoutingLog:
    return RoutingLog(
        {layer: torch.tensor(table, dtype=torch.int16) for layer, table in tables.items()},
        dict.fromkeys(tables, num_experts),
        torch.tensor(steps),
        "a test",
    )


LOG = make_log({2: [[3, 1], [1, 0], [7, 2]], 5: [[4, -1], [4, 5], [0, 1]]}, [0, 2, 3])


def assert_same(found: RoutingLog, expected: RoutingLog) -> None:
    assert found.layer_ids == expected.layer_ids
    for layer_id in expected.layer_ids:
        assert torch.equal(found.expert_ids[layer_id], expected.expert_ids[layer_id])
        assert found.expert_ids[layer_id].dtype == torch.int16
    assert torch.equal(found.step_offsets, expected.step_offsets)
    assert found.step_offsets.dtype == torch.int64
    assert (dict(found.num_experts), found.origin) == (dict(expected.num_experts), expected.origin)


def test_a_layer_is_recorded_as_it_routes_and_computes_the_same() -> None:
    torch.manual_seed(0)
    layers = [MoELayer(4, MoEConfig(8, 2, 3), layer_id=i).eval() for i in range(2)]
    source = ResidentSource({i: layer.experts for i, layer in enumerate(layers)})
    recorder = RoutingRecorder(source)
    ids: list[list[Tensor]] = [[], []]
    for num_tokens in (5, 1, 1):
        x = torch.randn(num_tokens, 4)
        for i, layer in enumerate(layers):
            y, routing = layer(x, Execution(LocalDispatcher(), recorder))
            assert torch.equal(y, layer(x)[0])
            ids[i].append(routing.expert_ids.view(-1, 2).clone())
    log = recorder.make_log("two layers")
    assert log.step_offsets.tolist() == [0, 5, 6, 7]
    for i in range(2):
        assert torch.equal(log.expert_ids[i].long(), torch.cat(ids[i]))
    assert (dict(log.num_experts), log.origin) == ({0: 8, 1: 8}, "two layers")


def test_tokens_with_fewer_experts_and_dropped_ones_have_gaps() -> None:
    recorder = RoutingRecorder(Silent())
    recorder.hint(0, make_routing([[3, 1, 2], [5]], 8))
    recorder.hint(1, make_routing([[3, 1], [5, 6]], 8, fixed_k=2, dropped=[True, False, False, True]))
    log = recorder.make_log()
    assert log.expert_ids[0].tolist() == [[3, 1, 2], [5, -1, -1]]
    assert log.expert_ids[1].tolist() == [[-1, 1], [5, -1]]


def test_a_step_that_ended_early_is_left_out() -> None:
    recorder = RoutingRecorder(Silent())
    with pytest.raises(DataError, match="nothing was recorded"):
        recorder.make_log()
    for layers, first in ((2, 0), (1, 3), (2, 5)):
        for layer in range(layers):
            recorder.hint(layer, make_routing([[first, 1]], 8, fixed_k=2))
    assert recorder.make_log().expert_ids[0].tolist() == [[0, 1], [5, 1]]


@pytest.mark.parametrize("num_experts", [8, 255, 256, 1000])
def test_a_file_holds_what_was_recorded(num_experts: int, tmp_path: Path) -> None:
    log = make_log({0: [[num_experts - 1, -1], [0, 3]], 4: [[1, 2], [2, 1]]}, [0, 1, 2], num_experts)
    path = tmp_path / "log.safetensors"
    path.write_text("older")
    log.write(path)
    assert_same(RoutingLog.read(path), log)
    assert list(tmp_path.iterdir()) == [path]


def test_small_ids_take_a_byte_each(tmp_path: Path) -> None:
    tokens = 5000
    log = make_log({0: [[1, 2, 3, 4]] * tokens}, list(range(tokens + 1)))
    log.write(tmp_path / "log.safetensors")
    assert (tmp_path / "log.safetensors").stat().st_size < tokens * (4 + 4) + 1000


def test_demands_are_the_experts_of_each_step_and_layer_in_order() -> None:
    assert list(LOG.demands()) == [
        ((2, 0), (2, 1), (2, 3)),
        ((5, 4), (5, 5)),
        ((2, 2), (2, 7)),
        ((5, 0), (5, 1)),
    ]
    assert LOG.keys == [(layer, expert) for layer in (2, 5) for expert in range(8)]


def test_a_steps_choice_and_routing_are_those_that_were_recorded() -> None:
    choice = LOG.get_choice(0, 2)
    assert (choice.expert_ids.tolist(), choice.fixed_k) == ([3, 1, 1, 0], 2)
    ragged = LOG.get_choice(0, 5)
    assert (ragged.expert_ids.tolist(), ragged.token_offsets.tolist()) == ([4, 4, 5], [0, 1, 3])
    assert ragged.fixed_k is None
    routing = LOG.get_routing(1, 2)
    assert (routing.expert_ids.tolist(), routing.num_experts, routing.fixed_k) == ([7, 2], 8, 2)
    assert routing.weights.tolist() == [0.5, 0.5]


def test_a_recorded_choice_can_be_given_to_a_layer() -> None:
    layer = MoELayer(4, MoEConfig(8, 2, 3)).eval()
    _, routing = layer(torch.randn(2, 4), given=LOG.get_choice(0, 2))
    assert routing.expert_ids.tolist() == [3, 1, 1, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30))
def test_regrouped_sequences_advance_together(num_tokens: int, num_sequences: int) -> None:
    log = make_log({0: [[i] for i in range(num_tokens)]}, [0, num_tokens], num_tokens)
    if num_sequences > num_tokens:
        with pytest.raises(DataError, match=r"must be between 1 and the tokens of the log"):
            log.regroup(num_sequences)
        return
    regrouped = log.regroup(num_sequences)
    length = num_tokens // num_sequences
    assert regrouped.num_steps == length
    for step in range(length):
        found = regrouped.get_choice(step, 0).expert_ids.tolist()
        assert found == [length * sequence + step for sequence in range(num_sequences)]


@pytest.mark.parametrize(
    ("tables", "steps", "reason"),
    [
        (
            {0: [[1, 2]]},
            [0, 2],
            r"int16 tables of 2 tokens, and that of layer 0 is torch\.int16 of shape \(1, 2\)",
        ),
        ({0: [[1, 8]]}, [0, 1], "holds experts 1 to 8 for layer 0, which has 8"),
        ({0: [[1, -2]]}, [0, 1], "holds experts -2 to 1"),
        ({0: [[1, 2]]}, [1, 1], "step offsets that do not count up from 0"),
        ({0: [[1, 2]]}, [0, 2, 1], "step offsets that do not count up from 0"),
        ({}, [0], r"tables of layers \[\]"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    tables: dict[int, list[list[int]]], steps: list[int], reason: str
) -> None:
    with pytest.raises(DataError, match=f"a routing log .*{reason}.*; record it anew"):
        make_log(tables, steps)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    log = RoutingLog({0: torch.zeros(2, 1, dtype=torch.int16)}, {0: 8}, torch.tensor([0, 2]))
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        log.write(tmp_path / "folder")
    (tmp_path / "log.draft").write_text("somebody's own")
    log.write(tmp_path / "log")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "log", "log.draft"]
    assert (tmp_path / "log.draft").read_text() == "somebody's own"


def test_a_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path} is a folder, and a file of recorded routing is needed"):
        RoutingLog.read(tmp_path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        RoutingLog.read(path)
    path.write_text("no tensors")
    with pytest.raises(DataError, match="is not a safetensors file"):
        RoutingLog.read(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=r"is not recorded routing of version 1: its format is None"):
        RoutingLog.read(path)
    metadata = {"format": "moesys-routing", "version": "1", "num_experts": '{"0": 8}'}
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    save_file({"0": torch.zeros(2, 1, dtype=torch.uint8), "step_offsets": offsets}, path, metadata)
    with pytest.raises(DataError, match=r"x\.safetensors: a routing log needs int16 tables of 1 tokens"):
        RoutingLog.read(path)
    for sizes in ("{}", "[1]", "not json", '{"0": "many"}'):
        save_file(
            {"0": torch.zeros(1, 1, dtype=torch.uint8), "step_offsets": offsets},
            path,
            metadata | {"num_experts": sizes},
        )
        with pytest.raises(DataError, match=r"x\.safetensors: "):
            RoutingLog.read(path)
