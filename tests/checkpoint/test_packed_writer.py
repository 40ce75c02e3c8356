"""Whatever ends the writing of a packed file: nothing is left of it, and an older file stays as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import compute_logits

from family_keys import FAMILY_KEYS
from model_folders import write_model
from moesys.checkpoint.files import FileSystem
from moesys.checkpoint.load import load_model
from moesys.checkpoint.packing import pack_model
from moesys.errors import CheckpointError, DiskSpaceError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", FAMILY_KEYS["mixtral"] | {"num_hidden_layers": 1})
    return tmp_path / "model"


class FailingAt(FileSystem):
    """Raises at the n-th system call; counts them."""

    def __init__(self, failing: int, error: BaseException) -> None:
        self.failing, self.error, self.num_calls = failing, error, 0

    def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == self.failing:
            raise self.error
        return super().system_call(call, *args, **kwargs)


class ShortWrites(FileSystem):
    """A disk that takes at most a hundred bytes at a time."""

    def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if call is os.pwrite:
            return os.pwrite(args[0], args[1][:100], args[2])
        return super().system_call(call, *args, **kwargs)


class SmallDisk(FileSystem):
    """Says that everything fits, and is full after so many bytes."""

    def __init__(self, num_bytes: int) -> None:
        self.left = num_bytes

    def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if call is os.pwrite:
            self.left -= len(args[1])
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().system_call(call, *args, **kwargs)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()],
    ids=["io", "full", "ctrl-c"],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_at_any_call_leaves_what_was_there(
    exists: bool, error: BaseException, model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "to" / "file"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    counting = FailingAt(0, error)
    pack_model(model, tmp_path / "whole", files=counting)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    # The last calls sync the folder: the file has its name by then.
    last = counting.num_calls - 2
    for failing in [*range(1, 12), *range(12, last, 17), last - 1, last]:
        with pytest.raises(expected):
            pack_model(model, target, overwrites=True, files=FailingAt(failing, error))
        assert [path.name for path in target.parent.iterdir()] == (["file"] if exists else [])
        assert not exists or target.read_text() == "old"


def test_a_full_disk_is_told_with_what_is_needed(model: Path, tmp_path: Path) -> None:
    whole = pack_model(model, tmp_path / "whole")
    needed = whole.num_bytes
    with pytest.raises(
        DiskSpaceError, match=rf"{tmp_path / 'file'}: .*it needs {needed} bytes and \d+ bytes are free"
    ):
        pack_model(model, tmp_path / "file", files=SmallDisk(needed // 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "whole"]
    pack_model(model, tmp_path / "file", files=SmallDisk(2 * needed))


def test_too_small_a_disk_is_refused_before_a_weight_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(FileSystem, "free_bytes", lambda self, path: 1000)
    monkeypatch.setattr("moesys.checkpoint.weight_reader.stream", fail)
    with pytest.raises(
        DiskSpaceError, match=r"it needs [\d.]+ KiB and 1000 B are free; free [\d.]+ KiB or use"
    ):
        pack_model(model, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_short_writes_are_continued(model: Path, tmp_path: Path) -> None:
    pack_model(model, tmp_path / "one")
    pack_model(model, tmp_path / "other", files=ShortWrites())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert torch.equal(
        compute_logits(load_model(tmp_path / "other")), compute_logits(load_model(tmp_path / "one"))
    )


def test_a_source_that_ends_early_leaves_nothing(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    size = weights.stat().st_size

    def shorten(done: int, total: int) -> None:
        os.truncate(weights, size // 2)

    with pytest.raises(Exception, match="became shorter"):
        pack_model(model, tmp_path / "file", on_progress=shorten)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
