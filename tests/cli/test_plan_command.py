"""``moesys plan``: what it says of a large model on a machine with round rates, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_calls import Answer, Call

from family_keys import FAMILY_KEYS
from made_profiles import make_profile
from model_folders import write_model, write_sparse_model
from moesys.cli import profiles
from moesys.cli.plan_options import choose_budget_step
from moesys.models import DecoderConfig
from moesys.moe.routing_log import RoutingLog
from moesys.planning.machine import read_disk, read_machine
from moesys.planning.machine_profile import find_profile_path, read_profiles, save_profile

LARGE_KEYS = FAMILY_KEYS["olmoe"] | {
    "hidden_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 50304,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
}


def count_step_bytes(
    config: DecoderConfig, num_tokens: int, num_positions: int, itemsize: int, num_sequences: int
) -> int:
    """Whatever the engine takes; here what is easy to count."""
    return num_tokens * 2**18 + num_positions * itemsize * num_sequences


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesys.cli.inspect_sizing.compute_step_bytes", count_step_bytes)
    monkeypatch.setattr("moesys.cli.inspect_sizing.read_device_bytes", lambda: None)
    monkeypatch.setattr("moesys.cli.inspect_sizing.read_ram_bytes", lambda: 64 * 2**30)


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "model"
    assert write_sparse_model(folder, LARGE_KEYS, num_shards=2) > 6 * 2**30
    return folder


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "machine.json"
    save_profile(path, make_profile(layer_overhead_s=1e-4))
    return path


@pytest.fixture
def plan_large(moesys_command: Call, large_model: Path, profile: Path) -> Call:
    def call(*options: object) -> Answer:
        return moesys_command("plan", large_model, "--profile", profile, *options)

    return call


def read(answer: Answer) -> dict[str, Any]:
    assert answer.status == 0, answer.err
    return json.loads(answer.out)


def test_the_text_of_a_large_model(plan_large: Call) -> None:
    answer = plan_large("--host-memory", "3.5GiB")
    assert answer.status == 0, answer.err
    assert max(map(len, answer.out.splitlines())) <= 80
    assert answer.out.splitlines() == EXPECTED.splitlines()


def test_a_model_that_fits_is_resident(plan_large: Call) -> None:
    found = read(plan_large("--json"))["plan"]
    assert (found["prefill"]["mode"], found["decode"]["mode"]) == ("resident", "resident")
    assert (found["num_slots"], found["miss_rate"]) == (512, 0.0)
    assert "are read" not in plan_large().out


def test_json_says_what_the_text_says(plan_large: Call) -> None:
    found = read(plan_large("--host-memory", "3.5GiB", "--json"))
    tree = found["plan"]
    (tier,) = tree["placement"]["tiers"]
    assert tree["used_bytes"] <= 3.5 * 2**30
    assert tier["num_experts"] == tree["num_slots"] < 512
    assert sum(found["parts"].values()) == tier["core_bytes"] + 512 * 12 * 2**20
    assert tree["decode"]["bound"] == "disk"
    assert 0 < tree["decode"]["tokens_per_s"] < tree["decode"]["tokens_per_s_if_skewed"]
    assert found["with_more"]["decode"]["tokens_per_s"] > tree["decode"]["tokens_per_s"]
    assert found["with_less"]["num_slots"] < tree["num_slots"] < found["with_more"]["num_slots"]
    assert tree["miss_rate"] == 1 - tree["num_slots"] / 512


def test_a_goal_of_throughput_opens_more_sequences(plan_large: Call) -> None:
    one, many, three = (
        read(plan_large("--host-memory", "24GiB", "--json", *options))["plan"]
        for options in ((), ("--goal", "throughput"), ("--batch", "3", "--context", "100"))
    )
    assert (one["batch_size"], many["batch_size"], three["batch_size"]) == (1, 32, 3)
    assert many["decode"]["tokens_per_s"] > one["decode"]["tokens_per_s"]
    assert three["num_positions"] == three["prefill_tokens"] == 100


def test_inspect_and_plan_agree(plan_large: Call, moesys_command: Call, large_model: Path) -> None:
    """On everything, given the tokens of a pass."""
    options = ("--host-memory", "3GiB", "--context", "512", "--json")
    planned = read(plan_large(*options))["plan"]
    inspected = read(moesys_command("inspect", large_model, *options))["placement"]
    assert planned["prefill_tokens"] == 512
    assert {key: inspected[key] for key in planned["placement"]} == planned["placement"]


def test_recorded_routing_takes_the_place_of_the_assumption(plan_large: Call, tmp_path: Path) -> None:
    """A log in which every token needs the experts of the last one, that is, none is read."""
    table = torch.arange(8, dtype=torch.int16).repeat(20, 1)
    log = RoutingLog(dict.fromkeys(range(8), table), dict.fromkeys(range(8), 64), torch.arange(21))
    log.write(tmp_path / "log")
    answer = plan_large("--host-memory", "3.5GiB", "--routing", tmp_path / "log")
    assert "0% of the experts that a token needs are read (log, 20 tokens)" in answer.out
    assert " to " not in answer.out.partition("writing")[2].splitlines()[0]
    other = RoutingLog({0: table}, {0: 64}, torch.arange(21))
    other.write(tmp_path / "other")
    answer = plan_large("--routing", tmp_path / "other")
    assert answer.status == 1
    assert (
        "was recorded from 1 MoE layers of 64 experts, the model has 8 MoE layers of 64 experts"
        in answer.error
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host-memory", "1GiB"], "--host-memory 1.0 GiB is less than resident weights"),
        (["--host-memory", "8GB"], "--host-memory ('8GB') must be a size above 0"),
        (["--goal", "speed"], "--goal ('speed') must be latency or throughput"),
        (["--context", "5000"], "--context (5000) must not exceed what the model was made for, 4096 tokens"),
        (["--routing", "/nowhere"], "/nowhere"),
        (["--host-memory", "8GiB", "--device-memory", "8GiB"], "name the same RAM"),
        (["--batch", "1000000"], "raise it, or open fewer than 1000000 sequences at once"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, plan_large: Call) -> None:
    answer = plan_large(*options)
    assert (answer.status, answer.out) == (1, "")
    assert message in answer.error


def test_less_memory_than_enough_is_told(plan_large: Call) -> None:
    assert "128.0 MiB less: too little to run" in plan_large("--host-memory", "1400MiB").out


@pytest.mark.parametrize(
    ("budget_bytes", "step_bytes"),
    [(64 * 2**30, 2**30), (8 * 2**30, 2**30), (2**33 - 1, 2**29), (262 * 2**20, 2**25), (9, 1), (1, 1)],
)
def test_the_step_is_a_readable_part_of_the_budget(budget_bytes: int, step_bytes: int) -> None:
    assert choose_budget_step(budget_bytes) == step_bytes


def test_a_share_is_named_as_one_beside_the_sum(plan_large: Call) -> None:
    answer = plan_large("--device-memory", "50%")
    title = answer.out.splitlines()[0]
    assert title.startswith("OlmoeForCausalLM within 50% of its weights, 3.3 GiB; ")
    total = next(line for line in answer.out.splitlines() if line.startswith("  all ")).split()[1:3]
    assert title.endswith(f"{' '.join(total)} of RAM in all")
    assert "  256.0 MiB more: " in answer.out
    assert read(plan_large("--host-memory", "50%", "--json"))["budget_step_bytes"] == 2**28


def test_cells_of_wide_numbers_stand_apart(profile: Path, large_model: Path, moesys_command: Call) -> None:
    fast = make_profile()
    rates = tuple(replace(rate, bytes_per_s=1e4 * rate.bytes_per_s) for rate in fast.disk_rates)
    many = {name: 1e4 * value for name, value in fast.gemm_flops_per_s.items()}
    weights = {name: 1e4 * value for name, value in fast.weight_read_bytes_per_s.items()}
    flops = {name: 1e4 * value for name, value in fast.linear_flops_per_s.items()}
    save_profile(
        profile,
        replace(
            fast,
            disk_rates=rates,
            gemm_flops_per_s=many,
            weight_read_bytes_per_s=weights,
            linear_flops_per_s=flops,
            memory_read_bytes_per_s=1e14,
        ),
    )
    answer = moesys_command("plan", large_model, "--host-memory", "3.5GiB", "--profile", profile)
    (row,) = (line for line in answer.out.splitlines() if line.startswith("  writing "))
    cells = [cell for cell in row.split("  ") if cell]
    assert len(cells) == 5, row
    assert len(row.split(" to ")) == 3
    assert "e+" not in answer.out


def test_what_cannot_run_as_it_is_stored_is_said_with_what_helps(
    tmp_path: Path, profile: Path, moesys_command: Call
) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["gpt_oss"])
    arguments = ("plan", tmp_path / "model", "--profile", profile)
    answer = moesys_command(*arguments, "--host-memory", "60%")
    said = " ".join(answer.out.split())
    assert "It cannot run like this:" in said
    assert "in another order than the kernels take" in said
    assert "pack the model first: moesys pack" in said
    assert max(map(len, answer.out.splitlines())) <= 80
    obstacle = read(moesys_command(*arguments, "--host-memory", "60%", "--json"))["obstacle"]
    assert "pack the model first" in obstacle
    assert read(moesys_command(*arguments, "--json"))["obstacle"] is None
    write_model(tmp_path / "dense", FAMILY_KEYS["llama"])
    answer = moesys_command("plan", tmp_path / "dense", "--profile", profile, "--host-memory", "2GiB")
    assert "dense has no experts that could stay on the disk" in " ".join(answer.out.split())


def test_the_first_prompt_of_what_fits_reads_it(plan_large: Call) -> None:
    """Within a budget; without one it is loaded before."""
    said = "the first prompt reads the experts, which then stay in memory"
    for options, is_read in ((("--host-memory", "32GiB"), True), ((), False)):
        tree = read(plan_large("--json", *options))["plan"]
        assert tree["prefill"]["mode"] == "resident"
        assert (tree["prefill"]["bound_times_s"]["disk_s"] > 0) == is_read
        assert (said in plan_large(*options).out) == is_read


def test_a_model_that_moesys_does_not_know_is_refused(tmp_path: Path, moesys_command: Call) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS["olmoe"])
    keys = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(keys | {"model_type": "olmoe9"}))
    answer = moesys_command("plan", tmp_path / "model")
    assert answer.status == 1
    assert "cannot be planned for" in answer.error
    assert "olmoe9" in answer.error


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_models_of_other_kinds(name: str, tmp_path: Path, profile: Path, moesys_command: Call) -> None:
    write_model(tmp_path / "model", FAMILY_KEYS[name])
    answer = moesys_command("plan", tmp_path / "model", "--host-memory", "2GiB", "--profile", profile)
    assert answer.status == 0, answer.err
    assert "resident" in answer.out


class TestProfiles:
    """Where the rates come from."""

    @pytest.fixture(autouse=True)
    def _own_cache_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOESYS_CACHE", str(tmp_path / "cache"))

    @pytest.fixture
    def measured(self, large_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        paths: list[Path] = []

        def measure(path: Path, on_progress: object) -> object:
            paths.append(path)
            return replace(make_profile(), machine=read_machine(), disk=read_disk(path))

        monkeypatch.setattr(profiles, "measure_machine", measure)
        return paths

    def test_the_first_time_it_measures_says_so_and_remembers(
        self, measured: list[Path], large_model: Path, moesys_command: Call
    ) -> None:
        first, second = (moesys_command("plan", large_model) for _ in range(2))
        assert "this machine was not measured yet; measuring, less than a minute" in first.error
        assert (first.out, second.err) == (second.out, "")
        assert measured == [large_model]

    def test_other_hardware_is_measured_anew(
        self, measured: list[Path], large_model: Path, moesys_command: Call
    ) -> None:
        save_profile(find_profile_path(), make_profile())
        assert (
            "the machine is not as it was measured: cpu Abacus 9000"
            in moesys_command("plan", large_model).error
        )
        assert len(read_profiles(find_profile_path())) == 2

    def test_a_damaged_file_is_replaced_and_said(
        self, measured: list[Path], large_model: Path, moesys_command: Call
    ) -> None:
        find_profile_path().parent.mkdir()
        find_profile_path().write_text("{")
        answer = moesys_command("plan", large_model)
        assert answer.status == 0
        assert "is not a JSON file" in answer.error
        assert "it is replaced" in answer.error
        assert moesys_command("plan", large_model).err == ""

    def test_a_named_file_is_taken_as_it_is(
        self, measured: list[Path], profile: Path, large_model: Path, moesys_command: Call
    ) -> None:
        assert "on Abacus 9000" in moesys_command("plan", large_model, "--profile", profile).out
        assert measured == []
        answer = moesys_command("plan", large_model, "--profile", profile.with_name("none"))
        assert "does not exist" in answer.error
        save_profile(profile, make_profile(probe="other", layer_overhead_s=9.0), ())
        mine = replace(
            make_profile(), machine=read_machine(), disk=read_disk(large_model), measured_on="today"
        )
        save_profile(profile, mine, read_profiles(profile))
        assert "measured today" in moesys_command("plan", large_model, "--profile", profile).out
        save_profile(profile, make_profile(machine=replace(mine.machine, num_cores=99)), [make_profile()])
        answer = moesys_command("plan", large_model, "--profile", profile)
        assert "holds 2 profiles and none of this machine and disk" in answer.error


EXPECTED = """\
OlmoeForCausalLM within 3.5 GiB of RAM

                                 RAM        disk
  embedding                196.5 MiB
  attention                256.1 MiB
  router                     4.0 MiB
  norms                     68.0 KiB
  head                     196.5 MiB
  experts                    2.2 GiB     3.8 GiB  186 of 512 in RAM
  KV cache                 256.0 MiB              1 sequence of 4096 tokens
  a step                   128.0 MiB              512 tokens of a prompt
  reserve                  313.7 MiB              loading and libraries
  all                        3.5 GiB     3.8 GiB

                         experts  predicted tokens/s  at most      bound by
  prompt of 2048 tokens  ring     83.3                175          arithmetic
  writing                cache    2.88 to 5.18        3.9 to 7.03  disk
  64% of the experts that a token needs are read (uniform routing, assumed)
  the higher rates are for routing that prefers some experts, as is usual
  disk: direct reads, 4 in flight
  measured 2026-01-02T03:04:05+00:00 on Abacus 9000

  256.0 MiB more: prompts +0%, writing +5% (207 experts in RAM, passes of 512)
  256.0 MiB less: prompts -0%, writing -5% (165 experts in RAM, passes of 512)
"""
