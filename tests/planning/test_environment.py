"""What is found on a machine, and what of it is worth a word: one fact at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made_profiles import DISK, GIGA, MACHINE, make_profile, make_rate
from moesys.planning import environment
from moesys.planning.environment import Environment, list_advice, read_environment
from moesys.planning.machine import Disk
from moesys.store import ReadMode

GOOD = Environment(
    machine=MACHINE,
    disk=DISK,
    ram_bytes=2**34,
    machine_bytes=2**34,
    num_all_cores=4,
    cpu_quota=None,
    load=0.1,
    swap_bytes=0,
    native_obstacle=None,
    torch_version="2.13",
    gpu=None,
    governor="performance",
    governor_driver="acpi-cpufreq",
    huge_pages="madvise",
)


def advise(**changes: Any) -> list[tuple[str, str]]:
    profile = changes.pop("profile", None)
    return [(each.what, each.fix) for each in list_advice(replace(GOOD, **changes), profile)]


def test_a_good_machine_needs_nothing() -> None:
    assert advise(profile=make_profile()) == []


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"native_obstacle": "no C compiler"}, "no native kernels", "apt-get install gcc"),
        ({"machine": replace(MACHINE, num_threads=1)}, "1 of 4 cores compute", "OMP_NUM_THREADS"),
        ({"num_all_cores": 16}, "may use 4 of 16 cores", "taskset"),
        ({"cpu_quota": 1.5}, "gets 1.5 cores' time for 4 cores", "--cpus"),
        ({"load": 3.0}, "other work is running (load 3.0 on 4 cores)", "moesys doctor again"),
        ({"ram_bytes": 2**32}, "may use 4.0 GiB of 16.0 GiB RAM", "memory limit"),
        ({"swap_bytes": 2**30}, "1.0 GiB lie in swap", "--host-memory"),
        ({"governor": "powersave"}, "lowest clock", "cpupower frequency-set -g performance"),
        ({"governor": "powersave", "governor_driver": None}, "lowest clock", "cpupower"),
        ({"huge_pages": "never"}, "huge pages are off", "echo madvise"),
        ({"disk": Disk("server:/models", "nfs4")}, "network file system (nfs4)", "copy the model"),
        ({"profile": make_profile(direct_obstacle="no O_DIRECT here")}, "no O_DIRECT here", "ext4"),
    ],
)
def test_each_fact_has_its_advice(changes: dict[str, Any], what: str, fix: str) -> None:
    ((found, mend),) = advise(**changes)
    assert what in found
    assert fix in mend


@pytest.mark.parametrize(
    "changes",
    [
        {"governor": "powersave", "governor_driver": "intel_pstate"},
        {"governor": "powersave", "governor_driver": "amd-pstate-epp"},
        {"governor": None, "governor_driver": None, "huge_pages": None, "load": None},
        {"swap_bytes": 2**20},
        {"cpu_quota": 4.0},
        {"load": 1.9},
    ],
)
def test_what_is_harmless_is_not_mentioned(changes: dict[str, Any]) -> None:
    assert advise(**changes) == []


def test_a_slow_disk_is_one_that_is_slow_in_order_too() -> None:
    rates = (
        make_rate(ReadMode.BUFFERED, 1, 0.01 * GIGA),
        make_rate(ReadMode.BUFFERED, 1, 0.2 * GIGA, is_sequential=True),
    )
    ((what, _),) = advise(profile=make_profile(disk_rates=rates))
    assert "the disk is slow (0.20 GB/s)" in what


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_facts_are_read_from_where_linux_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    write(cpu / "scaling_governor", "powersave\n")
    write(cpu / "scaling_driver", "intel_pstate\n")
    write(tmp_path / "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", "150000 100000\n")
    write(tmp_path / "sys/fs/cgroup/memory.max", "4096\n")
    monkeypatch.setattr(environment.native, "find_obstacle", lambda: "no compiler")
    found = read_environment(tmp_path, tmp_path)
    assert (found.governor, found.governor_driver, found.huge_pages) == (
        "powersave",
        "intel_pstate",
        "madvise",
    )
    assert (found.cpu_quota, found.ram_bytes, found.native_obstacle) == (1.5, 4096, "no compiler")
    assert found.machine_bytes > 4096
    assert found.machine.num_threads == 1


@pytest.mark.parametrize("text", ["max 100000\n", "", "100000\n"])
def test_without_a_quota_there_is_none(text: str, tmp_path: Path) -> None:
    write(tmp_path / "sys/fs/cgroup/cpu.max", text)
    assert read_environment(tmp_path, tmp_path).cpu_quota is None


def test_a_system_that_says_nothing_is_no_error(tmp_path: Path) -> None:
    found = read_environment(tmp_path, tmp_path)
    assert (found.governor, found.huge_pages, found.cpu_quota) == (None, None, None)
