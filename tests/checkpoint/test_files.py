"""Durable files: contents and digests, short writes, and what the errors of the system become."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesys.checkpoint.files import PIECE_BYTES, FileSystem, HashedReader, WrittenFile, write_text_atomic
from moesys.errors import CheckpointError, DamagedCheckpointError, DiskSpaceError


class FailingCall(FileSystem):
    """Fails each call of one function."""

    def __init__(self, target: Callable[..., Any], code: int) -> None:
        self.target, self.code = target, code

    def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if call is self.target:
            raise OSError(self.code, os.strerror(self.code))
        return super().system_call(call, *args, **kwargs)


class ShortWrites(FileSystem):
    """A disk that takes at most seven bytes at a time."""

    def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if call is os.write:
            return os.write(args[0], args[1][:7])
        return super().system_call(call, *args, **kwargs)


def test_written_file_has_contents_size_and_digest(tmp_path: Path) -> None:
    chunks = [b"header", memoryview(os.urandom(2 * PIECE_BYTES + 3)), b""]
    contents = b"".join(chunks)
    written = FileSystem().write_new_file(tmp_path / "a", chunks, len(contents))
    assert (tmp_path / "a").read_bytes() == contents
    assert written == WrittenFile(len(contents), hashlib.sha256(contents).hexdigest())


def test_short_writes_are_continued(tmp_path: Path) -> None:
    written = ShortWrites().write_new_file(tmp_path / "a", [b"0123456789" * 5], 50)
    assert (tmp_path / "a").read_bytes() == b"0123456789" * 5
    assert written.sha256 == hashlib.sha256(b"0123456789" * 5).hexdigest()


def test_a_disk_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    class Stuck(FileSystem):
        def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return 0 if call is os.write else super().system_call(call, *args, **kwargs)

    with pytest.raises(CheckpointError, match="0 bytes"):
        Stuck().write_new_file(tmp_path / "a", [b"x"], 1)


def test_an_existing_file_is_never_opened_for_writing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="exists"):
        FileSystem().write_new_file(tmp_path / "a", [b"new"], 3)
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", [os.open, os.write, os.fsync])
def test_a_full_disk_names_path_needed_and_free_bytes(
    tmp_path: Path, call: Callable[..., Any], code: int
) -> None:
    with pytest.raises(DiskSpaceError, match=r"it needs 123456 bytes and [0-9]+ bytes are free") as caught:
        FailingCall(call, code).write_new_file(tmp_path / "a", [b"x"], 123456)
    assert str(tmp_path / "a") in str(caught.value)


def test_other_errors_name_path_and_cause(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "a"
    with pytest.raises(CheckpointError, match="No such file") as caught:
        FileSystem().write_new_file(target, [b"x"], 1)
    assert str(target) in str(caught.value)
    assert not isinstance(caught.value, DiskSpaceError)


def test_ensure_directory_makes_ancestors_and_accepts_existing(tmp_path: Path) -> None:
    for _ in range(2):
        FileSystem().ensure_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("x")
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "file").write_text("x")
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "outside")
    FileSystem().remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    assert (tmp_path / "outside" / "precious").exists()


def test_write_text_atomic_replaces(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    write_text_atomic(path, "old ä")
    write_text_atomic(path, "new ä")
    assert path.read_text(encoding="utf-8") == "new ä"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", [os.open, os.write, os.fsync, os.close, os.rename])
def test_write_text_atomic_failure_keeps_the_old_file(tmp_path: Path, call: Callable[..., Any]) -> None:
    path = tmp_path / "small.json"
    write_text_atomic(path, "old")
    with pytest.raises(CheckpointError, match=r"small\.json"):
        write_text_atomic(path, "new", FailingCall(call, errno.EIO))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_hashed_reader_reads_once_and_checks(tmp_path: Path) -> None:
    path, contents = tmp_path / "a", os.urandom(PIECE_BYTES + 5)
    written = FileSystem().write_new_file(path, [contents], len(contents))
    with HashedReader(path, written) as reader:
        assert reader.read(5) == contents[:5]
        assert reader.left_bytes == PIECE_BYTES
        reader.check_digest()
        assert reader.left_bytes == 0
    with (
        pytest.raises(DamagedCheckpointError, match="was written"),
        HashedReader(path, WrittenFile(len(contents), "0" * 64)) as reader,
    ):
        reader.check_digest()
    with (
        pytest.raises(DamagedCheckpointError, match=f"{len(contents) + 1} bytes were written"),
        HashedReader(path, WrittenFile(len(contents) + 1, written.sha256)),
    ):
        pass


def test_hashed_reader_refuses_a_pipe_and_a_missing_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing"):
        with (
            pytest.raises(DamagedCheckpointError, match=name),
            HashedReader(tmp_path / name, WrittenFile(0, "")),
        ):
            pass
