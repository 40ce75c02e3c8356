"""Profiles: found for the hardware that they were measured on and no other, whole on the disk, and the best in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from made_profiles import DISK, GIGA, MACHINE, MIB, make_profile, make_rate
from moesys.errors import ConfigError
from moesys.planning.machine_profile import (
    ReadWay,
    explain_absence,
    find_profile,
    find_profile_path,
    read_profiles,
    save_profile,
)
from moesys.store import ReadMode

BUFFERED, DIRECT = ReadMode.BUFFERED, ReadMode.DIRECT


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "machine.json"
    assert read_profiles(path) == ()
    save_profile(path, make_profile(direct_obstacle="why"))
    assert read_profiles(path) == (make_profile(direct_obstacle="why"),)
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]


def test_it_lies_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESYS_CACHE", str(tmp_path))
    assert find_profile_path() == tmp_path / "machine.json"


def test_a_profile_takes_the_place_of_its_own_machines_and_disks_only(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    other_disk = make_profile(disk=replace(DISK, device="/dev/tape"))
    other_machine = make_profile(machine=replace(MACHINE, num_cores=8))
    for profile in (make_profile(), other_disk, other_machine, make_profile(probe="again")):
        save_profile(path, profile, read_profiles(path))
    assert read_profiles(path) == (other_disk, other_machine, make_profile(probe="again"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "machine.json"
    save_profile(path, make_profile())

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moesys.planning.machine_profile.os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        save_profile(path, make_profile(probe="new"))
    assert read_profiles(path) == (make_profile(),)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not a JSON file"),
        ("[]", "has format and version"),
        ('{"format": "moesys-machine", "version": 99, "profiles": []}', "99"),
        ('{"format": "moesys-machine", "version": 1}', "profiles|valid"),
        ('{"format": "moesys-machine", "version": 1, "profiles": [{}]}', "Field required"),
    ],
)
def test_other_files_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_profiles(path)
    assert "run moesys doctor to measure anew" in str(caught.value)


def test_a_number_that_is_none_is_refused_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    save_profile(path, make_profile())
    tree = json.loads(path.read_text())
    tree["profiles"][0]["gemm_flops_per_s"]["fp32"] = "fast"
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"0\.gemm_flops_per_s\.fp32: "):
        read_profiles(path)


@pytest.mark.parametrize(
    ("machine", "disk", "reason"),
    [
        (replace(MACHINE, num_cores=2), DISK, "num_cores 4 is now 2"),
        (
            replace(MACHINE, cpu="Slide rule", kernels="torch"),
            DISK,
            "cpu Abacus 9000 is now Slide rule, kernels",
        ),
        (MACHINE, replace(DISK, device="/dev/tape"), "the disk /dev/tape (ext4) was not measured yet"),
    ],
)
def test_hardware_that_changed_has_no_profile(machine: object, disk: object, reason: str) -> None:
    profiles = (make_profile(),)
    assert find_profile(profiles, MACHINE, DISK) is profiles[0]
    assert find_profile(profiles, machine, disk) is None  # pyrefly: ignore
    assert reason in explain_absence(profiles, machine, disk)  # pyrefly: ignore


def test_a_machine_that_was_never_measured_is_told_so() -> None:
    assert explain_absence((), MACHINE, DISK) == "this machine was not measured yet"


def test_the_best_read_is_the_fastest_near_the_size_and_of_equals_the_one_with_the_fewest_in_flight() -> None:
    profile = make_profile(
        disk_rates=(
            make_rate(BUFFERED, 1, 1.0 * GIGA, MIB),
            make_rate(DIRECT, 8, 9.0 * GIGA, MIB),
            make_rate(BUFFERED, 1, 1.0 * GIGA, 12 * MIB),
            make_rate(DIRECT, 2, 1.99 * GIGA, 12 * MIB),
            make_rate(DIRECT, 8, 2.0 * GIGA, 12 * MIB),
            make_rate(DIRECT, 4, 7.0 * GIGA, 16 * MIB, is_sequential=True),
        )
    )
    assert profile.find_best_read(30 * MIB).pattern.depth == 2
    assert profile.find_best_read(4 * MIB).bytes_per_s == 1.99 * GIGA
    assert profile.find_best_read(3 * MIB).bytes_per_s == 9.0 * GIGA
    assert profile.best_sequential_read.bytes_per_s == 7.0 * GIGA


def test_rates_of_one_way_to_read() -> None:
    profile = make_profile()
    assert profile.reads == (ReadWay(BUFFERED, 1), ReadWay(DIRECT, 4))
    assert profile.find_section_rate(ReadWay(BUFFERED, 1), 4 * MIB) == 1.0 * GIGA
    assert profile.find_sequential_rate(ReadWay(BUFFERED, 1)) == 2.0 * GIGA
