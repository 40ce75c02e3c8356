"""The memory that this process may use."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from moesys.planning import read_ram_bytes

TOTAL = psutil.virtual_memory().total


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    assert read_ram_bytes(tmp_path) == TOTAL


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_containers_limit_counts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("4096\n")
    assert read_ram_bytes(tmp_path) == 4096
    (tmp_path / name).write_text("max\n")
    assert read_ram_bytes(tmp_path) == TOTAL
    (tmp_path / name).write_text(f"{2 * TOTAL}\n")
    assert read_ram_bytes(tmp_path) == TOTAL
