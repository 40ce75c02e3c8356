"""The offload benchmark's workload, arithmetic, claims, memory cap, our own system, and exit code."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import offload
from decode_peers import LLAMA, OURS, RESIDENT, SYSTEMS, ceilings, worker
from decode_peers.claims import find_disagreements, make_claims
from decode_peers.measures import compute_gemm_share, compute_speed, compute_transfer_share, find_disk_rate
from decode_peers.ours import OurDecoding, open_system
from decode_peers.report import format_case
from decode_peers.traffic import Traffic, count_best_loads, count_replayed_loads
from decode_peers.workload import (
    WARM_STEPS,
    Case,
    Feed,
    Format,
    ModelFiles,
    Phase,
    Task,
    count_prefill_flops,
    count_token_bytes,
    draw_prompts,
    draw_steps,
)
from harness import Measured, Outcome
from make_checkpoint import SHAPES, make_checkpoint
from memory_cap import CapUnavailableError, find_own_group, find_parent, memory_cap, remove_abandoned
from moesys.moe.routing_log import RoutingLog
from process_memory import PeakOwnMemory, read_own_bytes

TINY = SHAPES["tiny"]
SINGLE = Phase(Feed.RANDOM, 1, 4, 5)
CAPPED = Case("capped/bf16", Format.BF16, (SINGLE,), (OURS, LLAMA), 2**30)
RAM = Case("ram/bf16", Format.BF16, (SINGLE,), (OURS, LLAMA))
BENCHMARKS = Path(offload.__file__).parent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("offload") / "model"
    make_checkpoint(folder, TINY, embedding_std=1.0)
    routing = folder.with_name("routing.safetensors")
    table = torch.tensor([[t % 4, (t + 1) % 4] for t in range(64)], dtype=torch.int16)
    RoutingLog({0: table, 1: (table + 1) % 4}, {0: 4, 1: 4}, torch.arange(65)).write(routing)
    return ModelFiles(folder, TINY, routing)


def make_record(phase: Phase, seconds: Sequence[float], **changes: Any) -> dict[str, Any]:
    """What a worker prints, for one phase."""
    timed = {
        "name": phase.name,
        "prefill_seconds": 2.0,
        "favourites": [7] * phase.batch,
        "step_seconds": list(seconds),
        "growth_bytes": 0,
        "disk_bytes": 0,
        "traffic": {
            "num_loads": 4,
            "num_demands": 8,
            "used_bytes": 3e9,
            "num_best": 3,
            "policy_share": 0.75,
            "num_replayed": {"lru": 5},
        },
    }
    record = {
        "open_seconds": 1.0,
        "peak_bytes": 2**29,
        "cap_bytes": 2**30,
        "ceilings": {"memory": 1e9, "gemm": 1e9, "buffered x2": 1e9, "direct x4": 2e9},
    }
    if changes.get("cap_bytes", 0) is None:
        timed["traffic"] = None
    phase_changes = {name: changes.pop(name) for name in list(changes) if name in timed}
    return {**record, **changes, "phases": {phase.name: {**timed, **phase_changes}}}


def make_measured(**systems: Sequence[dict[str, Any]]) -> Measured:
    measured = Measured()
    for name, records in systems.items():
        for record in records:
            measured.add(name.replace("_", "."), Outcome(record=record))
    return measured


def test_tokens_are_the_same_in_every_process_and_differ_between_phases() -> None:
    other = Phase(Feed.RANDOM, 2, 4, 5)
    assert draw_prompts(SINGLE, 512, 0) == draw_prompts(SINGLE, 512, 0)
    assert draw_prompts(SINGLE, 512, 0) != draw_prompts(SINGLE, 512, 1)
    assert draw_steps(SINGLE, 512, 0) != [tokens[:1] for tokens in draw_steps(other, 512, 0)]
    assert [len(tokens) for tokens in draw_steps(other, 512, 0)] == [2] * (WARM_STEPS + 5)
    assert {len(prompt) for prompt in draw_prompts(other, 512, 0)} == {4}
    assert len({*itertools.chain(*draw_steps(Phase(Feed.RANDOM, 8, 4, 50), 50304, 0))}) > 400


def test_bytes_of_a_token_are_those_of_the_weights_that_it_touches() -> None:
    shape = SHAPES["olmoe-8"]
    experts, attention, head = 8 * 8 * 3 * 2048 * 1024, 8 * 4 * 2048**2, 2048 * 50304
    rest = 8 * (4 * 64 * 2048 + 8 * 2048) + 2 * 2 * 2048
    assert count_token_bytes(shape, Format.BF16) == 2 * (experts + attention + head) + rest
    assert count_token_bytes(shape, Format.INT8) == 1.0625 * (experts + attention + head) + rest


def test_operations_of_a_prompt() -> None:
    shape = SHAPES["olmoe-8"]
    active = 8 * (8 * 3 * 2048 * 1024 + 4 * 2048**2 + 64 * 2048)
    scores = 8 * 4 * 2048 * (512 * 513 // 2)
    assert count_prefill_flops(shape, 512) == 2 * 512 * active + scores + 2 * 2048 * 50304


def brute_force(demands: Sequence[Sequence[Hashable]], num_slots: int, start: frozenset[Hashable]) -> int:
    """The fewest loads over every choice of what is left after each group, which keeps the whole group."""
    costs = {start: 0}
    for group in demands:
        following: dict[frozenset[Hashable], int] = {}
        for here, cost in costs.items():
            missing = set(group) - here
            others = here - set(group)
            for kept in itertools.combinations(others, min(len(others), num_slots - len(group))):
                left = frozenset(kept) | set(group)
                following[left] = min(following.get(left, 10**9), cost + len(missing))
        costs = following
    return min(costs.values())


def test_the_best_loads_are_those_of_an_exhaustive_search() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        groups = [tuple(generator.choice(7, size=2, replace=False).tolist()) for _ in range(7)]
        start = frozenset(generator.choice(7, size=3, replace=False).tolist())
        assert count_best_loads(groups, 3, start) == brute_force(groups, 3, start)
        assert count_best_loads(groups, 3, start) <= min(count_replayed_loads(groups, 3, start).values())


def test_what_is_there_at_the_start_costs_nothing() -> None:
    assert count_best_loads([(1, 2), (3,)], 3, [1, 2]) == 1
    assert count_best_loads([(1, 2), (3,)], 3, []) == 3
    assert count_replayed_loads([(1, 2), (3,)], 3, [1, 2])["lru"] == 1


def test_shares_of_traffic() -> None:
    traffic = Traffic(8, num_loads=4, loaded_bytes=400, used_bytes=300, num_best=3, num_replayed={})
    assert traffic.policy_share == 0.75
    assert traffic.record["policy_share"] == 0.75
    assert Traffic(8, 0, 0, 0, 0, {}).policy_share == 1.0


def test_a_step_takes_its_median_in_memory_and_its_mean_under_a_cap() -> None:
    seconds = [1.0, 1.0, 1.0, 1.0, 6.0]
    assert compute_speed(make_record(SINGLE, seconds, cap_bytes=None), SINGLE) == 1.0
    assert compute_speed(make_record(SINGLE, seconds), SINGLE) == 0.5
    eight = Phase(Feed.RANDOM, 8, 4, 5)
    assert compute_speed(make_record(eight, seconds), eight) == 4.0
    prompt = Phase(Feed.RANDOM, 1, 512, 0)
    assert compute_speed(make_record(prompt, []), prompt) == 256.0


def test_the_transfer_share_is_of_the_disk_or_of_memory_whichever_takes_longer() -> None:
    record = make_record(SINGLE, [1.0, 2.0])
    assert find_disk_rate(record) == 2e9
    assert compute_transfer_share(record, SINGLE, CAPPED, TINY) == pytest.approx(1.5 / 3)
    record["phases"][SINGLE.name]["traffic"]["used_bytes"] = 0
    share = 2 * count_token_bytes(TINY, Format.BF16) / 1e9 / 3
    assert compute_transfer_share(record, SINGLE, CAPPED, TINY) == pytest.approx(share)


def test_the_share_of_arithmetic() -> None:
    prompt = Phase(Feed.RANDOM, 1, 512, 0)
    record = make_record(prompt, [], prefill_seconds=4.0)
    assert compute_gemm_share(record, prompt, TINY) == pytest.approx(count_prefill_flops(TINY, 512) / 4e9)


def get_claims(case: Case, measured: Measured) -> dict[str, Any]:
    return {claim.name: claim for claim in make_claims(case, measured, TINY)}


def test_claims_of_decoding_under_a_cap() -> None:
    ours = [make_record(SINGLE, [1.0]), make_record(SINGLE, [2.0])]
    theirs = [make_record(SINGLE, [1.2]), make_record(SINGLE, [2.4])]
    claims = get_claims(CAPPED, make_measured(moesys=ours, llama_cpp=theirs))
    assert claims["capped/bf16/random_x1/transfer_share"].pairs == (1.5, 0.75)
    assert claims["capped/bf16/random_x1/over_llama.cpp"].pairs == pytest.approx((1.2, 1.2))
    assert claims["capped/bf16/random_x1/over_llama.cpp"].verdict == "ok"
    assert claims["capped/bf16/memory"].pairs == (0.5, 0.5)
    assert {claim.verdict for claim in claims.values()} == {"ok"}
    ours[0]["peak_bytes"] = ours[1]["peak_bytes"] = 2**30 + 1
    claims = get_claims(CAPPED, make_measured(moesys=ours, llama_cpp=theirs))
    assert claims["capped/bf16/memory"].verdict == "short"


def test_steady_decoding_may_not_grow() -> None:
    records = [make_record(SINGLE, [1.0], growth_bytes=growth) for growth in (2**21, 2**22)]
    claims = get_claims(CAPPED, make_measured(moesys=records))
    assert claims["capped/bf16/random_x1/growth"].pairs == (2.0, 4.0)
    assert claims["capped/bf16/random_x1/growth"].verdict == "short"


def test_the_policy_share_is_claimed_of_recorded_routing() -> None:
    replayed = Phase(Feed.REPLAY, 1, 4, 5)
    case = Case("capped/bf16", Format.BF16, (SINGLE, replayed), (OURS,), 2**30)
    record = make_record(SINGLE, [1.0])
    claims = get_claims(case, make_measured(moesys=[record]))
    assert claims["capped/bf16/replay_x1/policy_share"].verdict == "skipped"
    record["phases"] |= make_record(replayed, [1.0])["phases"]
    claims = get_claims(case, make_measured(moesys=[record]))
    assert claims["capped/bf16/replay_x1/policy_share"].pairs == (0.75,)
    assert claims["capped/bf16/replay_x1/policy_share"].verdict == "short"
    assert "capped/bf16/random_x1/policy_share" not in claims


def test_claims_in_memory_and_of_absent_systems() -> None:
    share = count_token_bytes(TINY, Format.BF16) / 1e9
    record = make_record(SINGLE, [2 * share], cap_bytes=None)
    claims = get_claims(RAM, make_measured(moesys=[record]))
    assert claims["ram/bf16/random_x1/share_of_memory"].pairs == pytest.approx((0.5,))
    assert claims["ram/bf16/random_x1/over_llama.cpp"].missing == LLAMA
    assert "ram/bf16/memory" not in claims
    assert {claim.verdict for claim in get_claims(RAM, Measured()).values()} == {"skipped"}


def test_the_ring_is_compared_with_the_longer_of_its_two_bounds() -> None:
    prompt = Phase(Feed.RANDOM, 1, 512, 0)
    case = Case("ring/bf16", Format.BF16, (prompt,), (OURS, RESIDENT), 2**30)
    read_seconds = 2 * TINY.num_parameters / 2e9
    ours = [make_record(prompt, [], prefill_seconds=s) for s in (2.0, 3 * read_seconds)]
    resident = [make_record(prompt, [], prefill_seconds=s) for s in (1.0, read_seconds / 2)]
    measured = make_measured(moesys=ours)
    assert get_claims(case, measured)["ring/bf16/prefill_512/over_bound"].missing == RESIDENT
    for record in resident:
        measured.add(RESIDENT, Outcome(record=record))
    claim = get_claims(case, measured)["ring/bf16/prefill_512/over_bound"]
    assert claim.pairs == pytest.approx((2.0, 3.0))
    assert claim.verdict == "short"


def test_systems_that_decode_other_models_are_told() -> None:
    four = Phase(Feed.RANDOM, 4, 4, 5)
    case = Case("ram/bf16", Format.BF16, (four,), (OURS, LLAMA))
    ours = make_record(four, [1.0], favourites=[1, 2, 3, 4])
    flipped = make_record(four, [1.0], favourites=[1, 2, 3, 9])
    other = make_record(four, [1.0], favourites=[1, 8, 8, 8])
    assert find_disagreements(case, make_measured(moesys=[ours], llama_cpp=[flipped])) == []
    (line,) = find_disagreements(case, make_measured(moesys=[ours], llama_cpp=[other]))
    assert "not of one model" in line


def test_a_table_names_speeds_ceilings_and_other_policies() -> None:
    text = format_case(CAPPED, make_measured(moesys=[make_record(SINGLE, [1.0])]), TINY)
    assert "capped/bf16 within 1.00 GiB" in text
    assert (
        "4.0 experts read per step of 8.0 used; a cache that knew the future 3.0; replayed: lru 5.0" in text
    )
    assert "direct x4 2.00" in text


class FakeDecoding:
    """Says that the likeliest token is the one after the last."""

    def __init__(self) -> None:
        self.fed: list[list[int]] = []
        self.marked_after: int | None = None

    def begin(self, phase: Phase, prompts: Sequence[Sequence[int]]) -> list[int]:
        return [100] * len(prompts)

    def step(self, tokens: Sequence[int]) -> list[int]:
        self.fed.append(list(tokens))
        return [token + 1 for token in tokens]

    def mark(self) -> None:
        self.marked_after = len(self.fed)

    def count_traffic(self) -> Traffic | None:
        return None


@pytest.mark.parametrize("feed", [Feed.RANDOM, Feed.GREEDY])
def test_a_phase_is_fed_what_it_says_and_timed_after_warming_up(files: ModelFiles, feed: Feed) -> None:
    phase = Phase(feed, 2, 4, 5)
    decoding = FakeDecoding()
    record = worker.measure_phase(decoding, phase, Task(files, Format.BF16, (phase,), None, 1, 0))
    assert len(record["step_seconds"]) == 5
    assert decoding.marked_after == WARM_STEPS
    greedy = [[100 + i, 100 + i] for i in range(WARM_STEPS + 5)]
    assert decoding.fed == (greedy if feed is Feed.GREEDY else draw_steps(phase, TINY.vocab_size, 0))


def test_a_slow_phase_ends_early(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PHASE_SECONDS", -1.0)
    task = Task(files, Format.BF16, (SINGLE,), None, 1, 0)
    assert len(worker.measure_phase(FakeDecoding(), SINGLE, task)["step_seconds"]) == worker.MIN_STEPS


@contextmanager
def open_ours(files: ModelFiles, phase: Phase, cap_bytes: int | None) -> Iterator[OurDecoding]:
    with open_system("budget", Task(files, Format.BF16, (phase,), cap_bytes, 1, 0)) as decoding:
        yield decoding


def decode(decoding: OurDecoding, phase: Phase) -> list[list[int]]:
    found = [decoding.begin(phase, draw_prompts(phase, TINY.vocab_size, 0))]
    steps = draw_steps(phase, TINY.vocab_size, 0)
    found += [decoding.step(tokens) for tokens in steps[:WARM_STEPS]]
    decoding.mark()
    return found + [decoding.step(tokens) for tokens in steps[WARM_STEPS:]]


def test_ours_decodes_the_same_in_memory_and_under_a_cap(files: ModelFiles) -> None:
    phase = Phase(Feed.RANDOM, 3, 6, 5)
    with open_ours(files, phase, None) as decoding:
        resident = decode(decoding, phase)
        assert decoding.count_traffic() is None
    with open_ours(files, phase, 2**30) as decoding:
        assert decode(decoding, phase) == resident
        traffic = decoding.count_traffic()
    assert len({*itertools.chain(*resident)}) > 5
    assert traffic is not None
    assert 5 * 2 * 2 <= traffic.num_demands <= 5 * 2 * 4
    assert traffic.num_best <= traffic.num_loads


def test_a_replayed_token_goes_to_the_experts_of_the_log(files: ModelFiles) -> None:
    phase = Phase(Feed.REPLAY, 2, 4, 5)
    assert files.routing is not None
    log = RoutingLog.read(files.routing)
    with open_ours(files, phase, 2**30) as decoding:
        decode(decoding, phase)
        recorder = decoding._meter._recorder
        replayed = recorder.make_log()
    for layer_id, table in log.expert_ids.items():
        streams = [table[stretch * 32 : stretch * 32 + 4 + WARM_STEPS + 5] for stretch in (0, 1)]
        prompts = torch.cat([stream[:4] for stream in streams])
        steps = torch.stack([stream[4:] for stream in streams], dim=1).flatten(0, 1)
        assert torch.equal(replayed.expert_ids[layer_id], torch.cat([prompts, steps]))


def test_a_worker_says_what_is_missing(files: ModelFiles) -> None:
    task = Task(files, Format.INT8, (SINGLE,), None, 1, 0)
    assert "int8.moesys is not there" in worker.measure(OURS, task)["skipped"]


def test_gguf_holds_the_same_weights(files: ModelFiles, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from safetensors.torch import load_file

    from decode_peers.gguf_file import write_gguf

    write_gguf(files.folder, TINY, Format.BF16, tmp_path / "bf16.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "bf16.gguf").tensors}
    [path] = files.folder.glob("*.safetensors")
    stored = load_file(path)
    up = torch.stack([stored[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(4)])
    assert bytes(tensors["blk.1.ffn_up_exps.weight"].data.tobytes()) == up.view(torch.uint8).numpy().tobytes()
    router = tensors["blk.0.ffn_gate_inp.weight"].data
    assert np.array_equal(router, stored["model.layers.0.mlp.gate.weight"].float().numpy())
    assert len(tensors) == 3 + 2 * 12


def test_own_memory_is_what_was_written_to() -> None:
    before = read_own_bytes()
    peak = PeakOwnMemory()
    block = np.ones(2**26, dtype=np.uint8)
    assert read_own_bytes() - before > 2**25
    while peak._peak_bytes - peak.idle_bytes < 2**25:
        time.sleep(0.01)
    del block
    assert peak.stop() > 2**25


def test_shared_memory_is_a_processs_own_too() -> None:
    before = read_own_bytes()
    with mmap.mmap(-1, 2**25, flags=mmap.MAP_SHARED) as shared:
        shared.write(b"x" * 2**25)
        assert read_own_bytes() - before >= 2**25


def test_the_disk_is_measured_in_every_mode_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(2**20))
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**16)
    rates = ceilings.measure_disk_rates([path], 0)
    assert {"buffered x2", "buffered x4"} <= rates.keys()
    assert all(rate > 0 for rate in rates.values())


def make_version_1(folder: Path) -> tuple[Path, Path]:
    (folder / "memory" / "box").mkdir(parents=True)
    groups = folder / "groups"
    groups.write_text("5:cpu:/\n4:memory:/box\n0::/\n")
    return folder, groups


def make_version_2(folder: Path, handed_on: str) -> tuple[Path, Path]:
    (folder / "slice" / "box").mkdir(parents=True)
    for group in (folder, folder / "slice", folder / "slice" / "box"):
        (group / "cgroup.controllers").write_text("cpu memory\n")
        (group / "cgroup.subtree_control").write_text(handed_on)
    (folder / "slice" / "box" / "cgroup.type").write_text("domain\n")
    groups = folder / "groups"
    groups.write_text("0::/slice/box\n")
    return folder, groups


def test_a_limit_is_a_child_of_the_own_group_in_version_1(tmp_path: Path) -> None:
    cgroups, groups = make_version_1(tmp_path)
    home = find_own_group(cgroups, groups)
    assert (home.path, home.limit_file) == (tmp_path / "memory" / "box", "memory.limit_in_bytes")
    assert find_parent(home) == home
    groups.write_text("4:memory:/of/the/host\n")
    assert find_own_group(cgroups, groups).path == tmp_path / "memory"


def test_a_limit_is_a_sibling_of_the_own_group_in_version_2(tmp_path: Path) -> None:
    home = find_own_group(*make_version_2(tmp_path, "cpu memory"))
    assert (home.path, home.limit_file) == (tmp_path / "slice" / "box", "memory.max")
    assert find_parent(home).path == tmp_path / "slice"


def test_the_memory_controller_is_handed_on_where_it_was_not(tmp_path: Path) -> None:
    find_parent(find_own_group(*make_version_2(tmp_path, "cpu")))
    assert (tmp_path / "slice" / "cgroup.subtree_control").read_text() == "+memory"


def test_a_system_without_memory_groups_says_so(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("5:cpu:/\n0::/\n")
    with pytest.raises(CapUnavailableError, match="memory controller"):
        find_own_group(tmp_path, groups)
    with pytest.raises(CapUnavailableError, match="no control groups"):
        find_own_group(tmp_path, tmp_path / "missing")


def test_groups_of_processes_that_were_ended_are_removed(tmp_path: Path) -> None:
    parent = find_own_group(*make_version_1(tmp_path))
    ended, alive = parent.path / "moesys-999999999", parent.path / f"moesys-{os.getpid()}"
    for path in (ended, alive, parent.path / "others"):
        path.mkdir()
    remove_abandoned(parent)
    assert not ended.exists()
    assert alive.exists()
    assert (parent.path / "others").exists()


def test_a_process_that_needs_more_than_its_cap_is_ended() -> None:
    try:
        with memory_cap(2**30):
            pass
    except CapUnavailableError as reason:
        pytest.skip(str(reason))
    program = (
        "import memory_cap\n"
        "with memory_cap.memory_cap(64 * 2**20):\n"
        "    held = b'x' * ({size} * 2**20)\n"
        "print('done')"
    )
    ends = [
        subprocess.run(
            [sys.executable, "-c", program.format(size=size)],
            cwd=BENCHMARKS,
            capture_output=True,
            text=True,
            check=False,
        )
        for size in (32, 256)
    ]
    assert ends[0].stdout == "done\n"
    assert ends[1].stdout == ""
    assert ends[1].returncode < 0


def test_every_case_has_systems_that_take_its_format() -> None:
    for plan in (offload.FULL, offload.QUICK):
        cases = plan.make_cases()
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.form in SYSTEMS[system].formats for case in cases for system in case.systems)
        assert all(len({phase.name for phase in case.phases}) == len(case.phases) for case in cases)


def test_a_peer_that_its_cap_ended_is_skipped_and_ours_is_not() -> None:
    ended = Outcome(failed="exit code -9: no message")
    assert offload.explain_end(LLAMA, CAPPED, ended).skipped == "it needs more than 1.00 GiB"
    assert offload.explain_end(OURS, CAPPED, ended) == ended
    assert offload.explain_end(LLAMA, RAM, ended) == ended
    broken = Outcome(failed="exit code 1: ValueError")
    assert offload.explain_end(LLAMA, CAPPED, broken) == broken


@pytest.mark.parametrize(("seconds", "favourite", "code"), [(0.5, 7, 0), (2.0, 7, 1), (0.5, 8, 1)])
def test_main_writes_a_record_and_tells_by_its_exit_code(
    files: ModelFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    favourite: int,
    code: int,
) -> None:
    started: list[str] = []
    rate = count_token_bytes(TINY, Format.BF16)

    def run_worker(script: Path, arguments: Sequence[str], threads: int, limit_seconds: float) -> Outcome:
        system, number = arguments[-2:]
        started.append(system)
        case = cases[int(number)]
        mine = seconds if system == OURS else 1.0
        likeliest = favourite if system == OURS else 7
        records = [
            make_record(
                phase,
                [mine],
                prefill_seconds=1e-9,
                favourites=[likeliest] * phase.batch,
                cap_bytes=None,
                ceilings={"memory": rate, "gemm": 1.0},
            )
            for phase in case.phases
        ]
        phases = {name: timed for record in records for name, timed in record["phases"].items()}
        return Outcome(record={**records[0], "phases": phases})

    monkeypatch.setattr("harness.run_worker", run_worker)
    monkeypatch.setattr(offload, "prepare_files", lambda files, plan: None)
    monkeypatch.setattr(offload, "measure_machine", lambda files: None)
    monkeypatch.setattr(offload, "find_files", lambda options, plan: files)
    arguments = ["--quick", "--parts", "ram", "--json", str(tmp_path / "record.json")]
    cases = offload.make_plan(offload.parse_arguments(arguments)).make_cases()
    assert offload.main(arguments) == code
    bf16 = cases[0].systems
    assert started[:6] == [*bf16, *reversed(bf16)]
    assert "claim ram/bf16/random_x1/over_llama.cpp" in capsys.readouterr().out
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["benchmark"] == "offload"
    assert bool(record["disagreements"]) == (favourite == 8)
    assert len(record["cases"]) == 2
