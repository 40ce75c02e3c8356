"""``moesys doctor``: the table, the object, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_calls import Call

from made_profiles import make_profile
from moesys.cli import profiles
from moesys.planning import environment
from moesys.planning.machine_profile import find_profile_path, read_profiles
from moesys.planning.measure import DiskTrial, measure_machine


@pytest.fixture(autouse=True)
def _own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESYS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    paths: list[Path] = []

    def measure(path: Path, on_progress: object) -> object:
        paths.append(path)
        return make_profile(layer_overhead_s=1e-4)

    monkeypatch.setattr(profiles, "measure_machine", measure)
    return paths


@pytest.fixture
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> environment.Environment:
        return environment.Environment(
            machine=make_profile().machine,
            disk=make_profile().disk,
            ram_bytes=2**34,
            machine_bytes=2**34,
            num_all_cores=4,
            cpu_quota=None,
            load=None,
            swap_bytes=0,
            native_obstacle="no C compiler was found",
            torch_version="2.13.0",
            gpu=None,
            governor=None,
            governor_driver=None,
            huge_pages="never",
        )

    monkeypatch.setattr(environment, "read_environment", read)


@pytest.mark.usefixtures("measured", "_known_machine")
def test_the_text(tmp_path: Path, moesys_command: Call) -> None:
    answer = moesys_command("doctor", "--folder", tmp_path)
    assert answer.status == 0, answer.err
    *lines, saved = answer.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines == EXPECTED.splitlines()
    assert saved == f"saved in {find_profile_path()}"
    assert read_profiles(find_profile_path()) == (make_profile(layer_overhead_s=1e-4),)


@pytest.mark.usefixtures("_known_machine")
def test_json_holds_it_all(measured: list[Path], tmp_path: Path, moesys_command: Call) -> None:
    found = json.loads(moesys_command("doctor", "--folder", tmp_path, "--json").out)
    assert found["environment"]["machine"]["cpu"] == "Abacus 9000"
    assert found["profile"]["memory_read_bytes_per_s"] == 1e10
    assert [each["what"][:17] for each in found["advice"]] == ["no native kernels", "huge pages are of"]
    assert found["file"] == str(find_profile_path())
    assert measured == [tmp_path]


@pytest.mark.usefixtures("_known_machine")
def test_without_a_folder_it_is_the_current_one(
    measured: list[Path], tmp_path: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert moesys_command("doctor").status == 0
    assert measured == [tmp_path]


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, moesys_command: Call) -> None:
    answer = moesys_command("doctor", "--folder", tmp_path / "nowhere")
    assert answer.status == 1
    assert "nowhere" in answer.error
    assert not find_profile_path().exists()


def test_once_for_real(tmp_path: Path, moesys_command: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement is made, of next to nothing; what it says is saved is what `moesys plan` finds."""
    trial = DiskTrial(0.0, (4096, 8192), 8192, (1, 2), file_bytes=2**20)
    monkeypatch.setattr("moesys.planning.ceilings._MIN_SECONDS", 0.0)
    monkeypatch.setattr("moesys.planning.ceilings._READ_BYTES", 2**22)
    monkeypatch.setattr("moesys.planning.ceilings._WEIGHT_BYTES", 2**22)
    monkeypatch.setattr("moesys.planning.ceilings._SIZE", 256)
    monkeypatch.setattr(profiles, "measure_machine", lambda path, step: measure_machine(path, step, trial))
    folder = tmp_path / "folder"
    folder.mkdir()
    answer = moesys_command("doctor", "--folder", folder)
    assert answer.status == 0, answer.err
    assert "  disk, GB/s, pieces in flight             1       2\n" in answer.out
    assert "a file of 1.0 MiB made in" in answer.out
    assert list(folder.iterdir()) == []
    (saved,) = read_profiles(find_profile_path())
    assert profiles.open_profile(folder, None) == saved


EXPECTED = """\
  CPU       Abacus 9000, 4 cores, 4 threads
  RAM       16.0 GiB
  GPU       none that torch can use
  kernels   native avx2, torch 2.13.0
  disk      /dev/drum (ext4)

  ceilings                                 alone    with the disk busy
  memory read                          10.0 GB/s             10.0 GB/s
  matrix products, fp32              200 GFLOP/s           200 GFLOP/s
  matrix products, bf16               50 GFLOP/s
  our kernels, fp32: one row            8.0 GB/s
  our kernels, fp32: many rows       100 GFLOP/s
  our kernels, bf16: one row            8.0 GB/s
  our kernels, bf16: many rows       100 GFLOP/s
  our kernels, int8: one row            8.0 GB/s
  our kernels, int8: many rows       100 GFLOP/s
  an empty layer                          100 us

  disk, GB/s, pieces in flight             1       4
  buffered, 4.0 MiB anywhere            1.00
  direct, 4.0 MiB anywhere                      2.00
  buffered, in order                    2.00
  direct, in order                              2.00
  fastest   direct, 4 in flight: 2.00 GB/s for 4.0 MiB
            2.00 with memory busy, 2.00 with matrix products
  read: a file

! no native kernels, torch computes several times slower: no C compiler was
  found
  fix: install a C compiler (apt-get install gcc, or dnf install gcc) and run
    again
! huge pages are off: weights load slower and every look-up of an address costs
  more
  fix: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled
"""
