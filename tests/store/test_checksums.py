"""Checksums kept between runs: for the file that they were taken of, and for no other."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from section_files import identify

from moesys.store import Extent
from moesys.store.checksums import ChecksumRecord


@pytest.fixture
def extent(tmp_path: Path) -> Extent:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(100))
    return Extent(identify(path), 10, 20, 0)


def keep(folder: Path, extent: Extent, checksum: int) -> None:
    record = ChecksumRecord(folder)
    record.note(extent, checksum)
    record.save()


def test_a_later_run_knows_what_an_earlier_one_noted(tmp_path: Path, extent: Extent) -> None:
    folder = tmp_path / "new" / "folder"
    keep(folder, extent, 5)
    record = ChecksumRecord(folder)
    assert record.find(extent) == 5
    assert record.find(replace(extent, part=3, part_offset=8)) == 5, "where it goes does not matter"
    for other in (replace(extent, offset=11), replace(extent, num_bytes=21)):
        assert record.find(other) is None
    assert record.note(extent, 6) == 5
    assert record.find(extent) == 5
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_the_first_note_of_a_run_holds(extent: Extent) -> None:
    record = ChecksumRecord()
    assert record.find(extent) is None
    assert record.note(extent, 5) == 5
    assert record.note(extent, 6) == 5
    record.save()


def test_a_changed_file_drops_its_record(tmp_path: Path, extent: Extent) -> None:
    keep(tmp_path, extent, 5)
    os.utime(extent.file.path, ns=(0, 1))
    changed = replace(extent, file=identify(extent.file.path))
    record = ChecksumRecord(tmp_path)
    assert record.find(changed) is None
    record.note(changed, 6)
    record.save()
    assert ChecksumRecord(tmp_path).find(changed) == 6
    assert ChecksumRecord(tmp_path).find(extent) is None
    for field in ("inode", "num_bytes", "modified_ns"):
        other = replace(changed, file=replace(changed.file, **{field: 77}))
        assert ChecksumRecord(tmp_path).find(other) is None


def test_two_runs_at_once_add_up(tmp_path: Path, extent: Extent) -> None:
    first, second = ChecksumRecord(tmp_path), ChecksumRecord(tmp_path)
    other = replace(extent, offset=50)
    first.note(extent, 5)
    second.note(other, 6)
    first.save()
    second.save()
    record = ChecksumRecord(tmp_path)
    assert (record.find(extent), record.find(other)) == (5, 6)


def test_what_the_disk_contradicts_is_not_kept_as_true(tmp_path: Path, extent: Extent) -> None:
    record, other = ChecksumRecord(tmp_path), replace(extent, offset=50)
    record.note(extent, 5)
    record.note(other, 6)
    assert record.doubt(extent) is None
    assert record.find(extent) == 5, "in this run it holds: the bytes that were handed out were these"
    record.save()
    later = ChecksumRecord(tmp_path)
    assert (later.find(extent), later.find(other)) == (None, 6)
    path = later.doubt(other)
    assert path is not None
    assert path.is_file()
    later.save()
    assert ChecksumRecord(tmp_path).find(other) == 6, "what an earlier run noted is the user's to delete"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"version": 1}', b"\xff\xfe"])
def test_a_record_that_is_none_is_made_anew(
    content: bytes, tmp_path: Path, extent: Extent, caplog: pytest.LogCaptureFixture
) -> None:
    keep(tmp_path / "kept", extent, 5)
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(content)
    record = ChecksumRecord(tmp_path / "kept")
    assert record.find(extent) is None
    assert f"the checksums in {path} cannot be read" in caplog.text
    record.note(extent, 6)
    record.save()
    assert json.loads(path.read_bytes())["extents"] == [[10, 20, 6]]


def test_a_folder_that_cannot_be_written_is_said_and_no_error(
    tmp_path: Path, extent: Extent, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "moesys"):
        keep(tmp_path / "file" / "folder", extent, 5)
    assert f"checksums of {extent.file.path} are not kept" in caplog.text


def test_a_write_that_fails_leaves_the_old_record(
    tmp_path: Path, extent: Extent, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path / "kept", extent, 5)

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        keep(tmp_path / "kept", replace(extent, offset=50), 6)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert ChecksumRecord(tmp_path / "kept").find(extent) == 5


def test_the_default_folder_is_the_cache_of_the_user(extent: Extent) -> None:
    record = ChecksumRecord.open_default()
    record.note(extent, 5)
    record.save()
    assert len(list((Path(os.environ["MOESYS_CACHE"]) / "checksums").iterdir())) >= 1
