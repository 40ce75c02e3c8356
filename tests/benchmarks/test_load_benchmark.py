"""The load benchmark's checkpoint, workers, page-cache handling, claims and exit code."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import load
from harness import Outcome
from make_checkpoint import SHAPES, make_checkpoint
from moesys.checkpoint import load_model

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("load") / "checkpoint"
    make_checkpoint(path, TINY)
    return path


def make_loads(temperature: load.Temperature, **systems: list[tuple[float, float, int]]) -> load.Loads:
    """(seconds to load, seconds to first logits, peak bytes) of each pass; of the disk, its rate first."""
    loads = load.Loads(temperature=temperature)
    for name, passes in systems.items():
        for load_seconds, first_logits_seconds, peak_bytes in passes:
            record = {
                "load_seconds": load_seconds,
                "first_logits_seconds": first_logits_seconds,
                "peak_bytes": peak_bytes,
                "weight_bytes": 1000,
                "bytes_per_second": load_seconds,
                "favourite": 7,
                "cached_share": 1.0 if temperature == "warm" else 0.0,
            }
            loads.add(name.replace("_", "-"), Outcome(record=record))
    return loads


def test_the_checkpoint_has_the_size_and_values_it_says(folder: Path) -> None:
    model = load_model(folder)
    assert model.count_parameters() == TINY.num_parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.float32}
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    assert sum(tensor.nbytes for tensor in tensors.values()) == 2 * TINY.num_parameters
    matrices = [tensor.float() for name, tensor in tensors.items() if "norm" not in name]
    assert all(0.015 < matrix.std() < 0.025 for matrix in matrices)
    assert not torch.equal(matrices[0].flatten()[:64], matrices[1].flatten()[:64])


def test_a_checkpoint_may_have_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("make_checkpoint.SHARD_BYTES", 100_000)
    make_checkpoint(tmp_path / "a", TINY)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert load_model(tmp_path / "a").count_parameters() == TINY.num_parameters


def test_published_sizes() -> None:
    assert SHAPES["olmoe-16"].num_parameters == 6_919_161_856
    assert 2 * SHAPES["olmoe-8"].num_parameters / 2**30 == pytest.approx(6.7, abs=0.1)


def test_a_worker_measures_a_load(folder: Path) -> None:
    plan = load.Plan("tiny", threads=1)
    outcome = load.start_worker(load.OURS, folder, plan, "warm")
    assert outcome.record is not None, outcome
    assert outcome.record["cached_share"] == 1
    assert 0 < outcome.record["load_seconds"] <= outcome.record["first_logits_seconds"]
    assert outcome.record["weight_bytes"] >= 2 * TINY.num_parameters
    assert 0 <= outcome.record["favourite"] < TINY.vocab_size


def test_the_disk_is_read_whole(folder: Path) -> None:
    load.drop_from_cache(folder)
    assert load.measure_disk(folder)["bytes_per_second"] > 0


def test_the_share_in_the_page_cache_is_what_the_system_says(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    path.write_bytes(b"x" * 10 * mmap.PAGESIZE)
    os.truncate(path, 20 * mmap.PAGESIZE)
    assert load.measure_cached_share(tmp_path) == 0.5


def test_files_are_in_the_page_cache_or_not_as_the_temperature_says(folder: Path) -> None:
    assert load.prepare_cache(folder, "warm") == 1
    share = load.prepare_cache(folder, "cold")
    if share == 1:
        pytest.skip("the file system of the tests keeps files in memory")
    assert share == 0
    assert load.prepare_cache(folder, "warm") == 1


def test_a_cache_that_is_not_as_the_name_says_is_told() -> None:
    warm, cold = (
        make_loads(temperature, moesys=[(1.0, 2.0, 1)] * 2, transformers=[(1.0, 2.0, 1)])
        for temperature in load.TEMPERATURES
    )
    assert (warm.odd_cache_line, cold.odd_cache_line) == (None, None)
    warm.records["transformers"][0]["cached_share"] = 0.6
    cold.records[load.OURS][1]["cached_share"] = 0.25
    assert warm.odd_cache_line == "not warm: only 60% of the files were in memory"
    assert cold.odd_cache_line == "not cold: up to 25% of the files were in memory"
    assert "not cold: up to 25%" in load.format_loads(cold)


def test_loads_of_different_models_are_told() -> None:
    warm, cold = (
        make_loads(temperature, moesys=[(1.0, 2.0, 1)] * 2, transformers=[(1.0, 2.0, 1)])
        for temperature in load.TEMPERATURES
    )
    assert load.find_disagreement([warm, cold]) is None
    cold.records["transformers"][0]["favourite"] = 8
    found = load.find_disagreement([warm, cold])
    assert found is not None
    assert "moesys [7], transformers [7, 8]" in found


def test_peak_memory_sees_what_was_freed_again() -> None:
    memory = load.PeakOwnMemory()
    block = torch.ones(2**26, dtype=torch.uint8)
    while memory._peak_bytes - memory.idle_bytes < 2**25:
        block.add_(1)
    del block
    assert memory.stop() > 2**25


def test_claims_compare_with_the_faster_rival_and_the_allowance() -> None:
    warm = make_loads(
        "warm",
        moesys=[(1.0, 2.0, 2**28), (1.0, 2.0, 2**28)],
        transformers=[(1.0, 3.0, 5), (1.0, 3.0, 5)],
        transformers_device_map=[(1.0, 2.5, 5), (1.0, 1.5, 5)],
    )
    cold = make_loads(
        "cold",
        moesys=[(2.0, 2.0, 2**28), (4.0, 2.0, 2**28 + 2040)],
        transformers=[(1.0, 3.0, 5), (1.0, 3.2, 5)],
        disk=[(1000.0, 0, 0), (1000.0, 0, 0)],
    )
    claims = {claim.name: claim for claim in load.make_claims(warm, cold)}
    assert claims["load/warm/speed_over_transformers"].pairs == (1.25, 0.75)
    assert claims["load/cold/speed_over_transformers"].pairs == (1.5, 1.6)
    assert claims["load/cold/share_of_disk"].pairs == (0.5, 0.25)
    assert claims["load/cold/share_of_disk"].verdict == "short"
    assert claims["load/memory"].verdict == "ok"
    assert max(claims["load/memory"].pairs) == pytest.approx(1.0, abs=1e-5)


def test_claims_without_a_rival_are_skipped() -> None:
    warm, cold = make_loads("warm", moesys=[(1.0, 2.0, 1)]), make_loads("cold")
    verdicts = {claim.name: (claim.verdict, claim.missing) for claim in load.make_claims(warm, cold)}
    assert verdicts["load/warm/speed_over_transformers"] == ("skipped", "transformers")
    assert verdicts["load/cold/speed_over_transformers"] == ("skipped", "moesys")
    assert verdicts["load/cold/share_of_disk"] == ("skipped", "moesys")
    assert verdicts["load/memory"] == ("ok", None)


@pytest.mark.parametrize(("seconds", "favourite", "code"), [(1.0, 7, 1), (0.5, 7, 0), (0.5, 8, 1)])
def test_main_writes_a_record_and_tells_by_its_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    favourite: int,
    code: int,
) -> None:
    started: list[tuple[str, bool]] = []

    def start_worker(system: str, folder: Path, plan: load.Plan, temperature: load.Temperature) -> Outcome:
        started.append((system, folder.name == "load-tiny"))
        mine = seconds if system == load.OURS else 1.0
        record: dict[str, Any] = {
            "load_seconds": mine,
            "first_logits_seconds": mine,
            "peak_bytes": 1,
            "weight_bytes": 100,
            "bytes_per_second": 100.0,
            "favourite": favourite if system == load.OURS else 7,
            "cached_share": 1.0 if temperature == "warm" else 0.5,
        }
        return Outcome(record=record)

    monkeypatch.setattr(load, "start_worker", start_worker)
    arguments = [
        "--quick",
        "--shape",
        "tiny",
        "--folder",
        str(tmp_path),
        "--json",
        str(tmp_path / "record.json"),
    ]
    assert load.main([*arguments, "--remove"]) == code
    assert started[:6] == [(name, True) for name in (*load.SYSTEMS, *reversed(load.SYSTEMS))]
    assert [name for name, _ in started[6:]] == [*load.SYSTEMS, load.DISK, load.DISK, *reversed(load.SYSTEMS)]
    assert "claim load/cold/speed_over_transformers" in capsys.readouterr().out
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["benchmark"] == "load"
    assert len(record["claims"]) == 4
    assert record["odd_cache"] == ["not cold: up to 50% of the files were in memory"]
    assert (record["disagreement"] is None) == (favourite == 7)
    assert not (tmp_path / "load-tiny").exists()
