"""The file that is read for a measurement: found or made, cold, and gone afterwards whatever happens."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from moesys.errors import ConfigError, DiskSpaceError
from moesys.planning import probe_file
from moesys.planning.probe_file import open_probe_file
from moesys.store import ReadMode
from open_descriptors import list_open_files

SIZE = 96 * 1024


@pytest.fixture(autouse=True)
def _closes_what_it_opens(tmp_path: Path) -> Any:
    yield
    assert not list_open_files(tmp_path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_made_file_has_no_name_from_the_first_moment(tmp_path: Path, error: type[BaseException]) -> None:
    found: list[tuple[int, int, int]] = []

    def read_and_fail() -> None:
        with open_probe_file(tmp_path, SIZE) as probe:
            data = os.pread(probe.descriptors[ReadMode.BUFFERED], SIZE, 0)
            found.append((len(list(tmp_path.iterdir())), probe.num_bytes, len(data)))
            assert len(set(data)) == 256
            raise error

    with pytest.raises(error):
        read_and_fail()
    assert found == [(0, SIZE, SIZE)]
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_it_is_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt), open_probe_file(tmp_path, SIZE):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DiskSpaceError, match=r"needs .* PiB|needs .* TiB"), open_probe_file(tmp_path, 2**50):
        pass

    def fill(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    with (
        pytest.raises(DiskSpaceError, match=r"needs 256\.1 MiB for a while"),
        open_probe_file(tmp_path, SIZE),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_largest_file_of_a_folder_is_read_if_it_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_file, "_FAIR_BYTES", 2000)
    (tmp_path / "small").write_bytes(bytes(1999))
    with open_probe_file(tmp_path, SIZE) as probe:
        assert "made in" in probe.name
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(2**20)
    with open_probe_file(tmp_path, SIZE) as probe:
        assert "made in" in probe.name
    (tmp_path / "large").write_bytes(bytes(3000))
    with open_probe_file(tmp_path, SIZE) as probe:
        assert (probe.name, probe.num_bytes) == (str(tmp_path / "large"), 3000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holes", "large", "small"]


def test_a_file_that_is_named_is_read_whatever_its_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    with open_probe_file(tmp_path / "file") as probe:
        assert os.pread(probe.descriptors[ReadMode.BUFFERED], 9, 0) == b"abc"


def test_a_file_system_without_direct_reads_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    with open_probe_file(tmp_path, SIZE) as probe:
        assert list(probe.descriptors) == [ReadMode.BUFFERED]
        assert probe.direct_obstacle == "the file system refuses O_DIRECT: Invalid argument"


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"), open_probe_file(tmp_path / "nowhere"):
        pass
