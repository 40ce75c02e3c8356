"""Training checkpoints: bits in, bits out; kills, faults and damage at every place.

Run as a script, this file is the kill test's own process: it forks a child per file operation, lets it die
there, and prints what could be loaded afterwards.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moesys.checkpoint import run_checkpoint
from moesys.checkpoint.files import FileSystem
from moesys.checkpoint.run_checkpoint import (
    RunState,
    describe_config_difference,
    list_checkpoints,
    load_newest_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from moesys.checkpoint.safetensors_file import Selection
from moesys.errors import CheckpointError, DamagedCheckpointError, DiskSpaceError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def make_state(step: int, num_tensors: int = 4, size: int = 300) -> RunState:
    generator = torch.Generator().manual_seed(step)
    tensors = {f"model.{i}.weight": torch.randn(size, 3, generator=generator) for i in range(num_tensors)}
    return RunState(step, step * 1000, tensors, {"config": {"lr": 0.1, "name": "ä"}, "seed": step})


def assert_equal(found: RunState, expected: RunState) -> None:
    assert (found.step, found.tokens) == (expected.step, expected.tokens)
    assert found.metadata == expected.metadata
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype, name
        assert found.tensors[name].shape == tensor.shape, name
        assert raw(found.tensors[name]) == raw(tensor), name


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def refuse_damage(message: str) -> None:
    raise AssertionError(f"unexpected damage: {message}")


def leftovers(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if ".tmp-" in entry.name]


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: hundreds of saves in it take seconds."""
    parent = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=parent if parent.is_dir() else tmp_path) as folder:
        yield Path(folder)


def all_dtypes_state() -> RunState:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for dtype in DTYPES:
        random_bytes = torch.randint(
            0, 256, (5 * 7 * dtype.itemsize,), dtype=torch.uint8, generator=generator
        )
        values = random_bytes % 2 if dtype == torch.bool else random_bytes
        matrix = values.view(dtype).reshape(5, 7)
        name = str(dtype).removeprefix("torch.")
        tensors |= {
            f"{name}.matrix": matrix,
            f"{name}.scalar": matrix[2, 3],
            f"{name}.empty": matrix[:0],
            f"{name}.transposed": matrix.t(),
            f"{name}.strided": matrix[::2, 1::3],
            f"{name}.expanded": matrix[:1].expand(4, 7),
        }
    tensors["parameter"] = torch.nn.Parameter(torch.randn(3))
    tensors["negated"] = torch.tensor([1 + 2j, 3 - 1j]).conj().imag
    tensors["negated_contiguous"] = torch.tensor([1 + 2j]).conj().imag
    return RunState(7, 99, tensors, {"rng": [1, 2, 3], "none": None})


def test_every_dtype_and_layout_comes_back_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_checkpoint, "MAX_SHARD_BYTES", 600)
    state = all_dtypes_state()
    path = save_checkpoint(tmp_path / "new" / "run", state, keep=2)
    assert path.name == "step-00000007"
    assert len(list(path.glob("*.safetensors"))) > 3
    expected = {
        name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in state.tensors.items()
    }
    loaded = load_newest_checkpoint(tmp_path / "new" / "run", on_damage=refuse_damage)
    assert_equal(loaded, RunState(7, 99, expected, state.metadata))


def test_safetensors_reads_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_checkpoint, "MAX_SHARD_BYTES", 600)
    state = all_dtypes_state()
    path = save_checkpoint(tmp_path, state, keep=2)
    found: dict[str, torch.Tensor] = {}
    for shard in path.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    assert found.keys() == state.tensors.keys()
    for name, tensor in state.tensors.items():
        expected = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        assert raw(found[name]) == raw(expected), name


def test_a_state_without_tensors(tmp_path: Path) -> None:
    state = RunState(0, 0, {}, {})
    save_checkpoint(tmp_path, state, keep=1)
    assert_equal(load_newest_checkpoint(tmp_path, on_damage=refuse_damage), state)


def peak_growth(action: Callable[[], object]) -> int:
    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system cannot reset the peak of resident memory")
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def test_peak_memory_is_one_tensor_when_saving_and_one_state_when_loading(tmp_path: Path) -> None:
    tensor_bytes = 32 * 2**20
    tensors = {f"t{i}": torch.full((2048, 4096), float(i)).t() for i in range(4)}
    saving = peak_growth(lambda: save_checkpoint(tmp_path, RunState(1, 1, tensors, {}), keep=1))
    assert tensor_bytes * 0.9 < saving < tensor_bytes * 1.5
    loading = peak_growth(lambda: load_newest_checkpoint(tmp_path, on_damage=refuse_damage))
    assert tensor_bytes * 3.9 < loading < tensor_bytes * 4.5


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": torch.zeros(2, dtype=torch.complex64)}, {}, "a has dtype torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, {}, "dense"),
        ({"a": torch.zeros(2, device="meta")}, {}, "storage"),
        ({"__metadata__": torch.zeros(2)}, {}, "__metadata__"),
        ({}, {"rng": torch.zeros(2)}, "Tensor is not JSON"),
        ({}, {"loss": float("nan")}, "JSON"),
        ({}, {"pair": (1, 2)}, "tuples"),
        ({}, {"by_id": {1: 2}}, "keys"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "run", RunState(1, 1, tensors, metadata), keep=1)
    assert not (tmp_path / "run").exists()


def test_no_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        assert list_checkpoints(directory) == []
        with pytest.raises(CheckpointError, match="start the run anew"):
            load_newest_checkpoint(directory, on_damage=refuse_damage)


def flip_byte(path: Path, position: int = -1) -> None:
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1
    path.write_bytes(contents)


def test_only_the_newest_are_kept_and_foreign_things_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.tmp-1").mkdir()
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000001.tmp-abcd").mkdir()
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, make_state(step), keep=2)
    assert list_checkpoints(tmp_path) == [3, 4]
    assert sorted(os.listdir(tmp_path)) == ["notes.tmp-1", "step-00000003", "step-00000004", "step-1"]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make_state(step), keep=3)
    flip_byte(tmp_path / "step-00000003" / "tensors-00000.safetensors")
    save_checkpoint(tmp_path, make_state(4), keep=2)
    assert list_checkpoints(tmp_path) == [2, 3, 4]
    assert "step-00000003" in caplog.text
    save_checkpoint(tmp_path, make_state(5), keep=2)
    assert list_checkpoints(tmp_path) == [4, 5]


def test_newer_checkpoints_are_left_alone(tmp_path: Path) -> None:
    for step in (5, 6, 3):
        save_checkpoint(tmp_path, make_state(step), keep=1)
    assert list_checkpoints(tmp_path) == [3, 6]


def test_nothing_is_deleted_before_the_new_one_was_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LyingDisk(FileSystem):
        def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if call is os.write and len(args[1]) > 1000:
                return os.write(args[0], bytes(len(args[1])))
            return super().system_call(call, *args, **kwargs)

    save_checkpoint(tmp_path, make_state(1), keep=1)
    with pytest.raises(DamagedCheckpointError):
        save_checkpoint(tmp_path, make_state(2), keep=1, files=LyingDisk())
    assert list_checkpoints(tmp_path) == [1]
    assert not leftovers(tmp_path)


def test_an_intact_checkpoint_of_the_step_is_returned_and_a_damaged_one_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_checkpoint(tmp_path, make_state(1), keep=2)
    inode = path.stat().st_ino
    assert save_checkpoint(tmp_path, make_state(1), keep=2) == path
    assert path.stat().st_ino == inode
    flip_byte(path / "tensors-00000.safetensors")
    damaged = (path / "tensors-00000.safetensors").read_bytes()
    assert save_checkpoint(tmp_path, make_state(1), keep=2) == path
    aside = next(tmp_path.glob("step-00000001.damaged-*"))
    assert (aside / "tensors-00000.safetensors").read_bytes() == damaged
    assert "set aside" in caplog.text
    assert_equal(load_newest_checkpoint(tmp_path, on_damage=refuse_damage), make_state(1))


def test_too_little_space_is_noticed_before_writing(tmp_path: Path) -> None:
    class Full(FileSystem):
        def free_bytes(self, path: Path) -> int:
            return int(1.2 * 4 * 300 * 3 * 4)

    save_checkpoint(tmp_path, make_state(1), keep=2)
    with pytest.raises(DiskSpaceError, match=r"needs \d+ bytes .* 17280 bytes are free.*untouched"):
        save_checkpoint(tmp_path, make_state(2), keep=2, files=Full())
    assert os.listdir(tmp_path) == ["step-00000001"]


class Unsynced(FileSystem):
    """Does not wait for the disk: a killed process loses nothing of what the system already holds."""

    def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None if call is os.fsync else super().system_call(call, *args, **kwargs)


class Counting(Unsynced):
    """Performs operation number ``at`` (counted from 0) through ``strike`` instead."""

    def __init__(self, at: int, strike: Callable[..., Any], *, sticky: bool = False) -> None:
        self.at, self.strike, self.sticky = at, strike, sticky
        self.count = 0
        self.calls: list[str] = []

    def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = self.count
        self.count += 1
        self.calls.append(call.__name__)
        if number == self.at or (self.sticky and number > self.at):
            return self.strike(call, *args, **kwargs)
        return super().system_call(call, *args, **kwargs)


def prepare_base(directory: Path) -> None:
    """Two older checkpoints, one of which the next save deletes, and the rest of an interrupted save."""
    for step in (1, 2):
        save_checkpoint(directory, make_state(step, 3), keep=2, files=Unsynced())
    (directory / "step-00000003.tmp-0123").mkdir()
    (directory / "step-00000003.tmp-0123" / "tensors-00000.safetensors").write_bytes(b"half")


def count_operations(base: Path, scratch: Path, new: RunState) -> int:
    shutil.copytree(base, scratch)
    counting = Counting(-1, os.abort)
    save_checkpoint(scratch, new, keep=2, files=counting)
    shutil.rmtree(scratch)
    return counting.count


def fail_with(code: int) -> Callable[..., Any]:
    def strike(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return strike


def after_half_a_write(code: int) -> Callable[..., Any]:
    def strike(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if call is os.write:
            os.write(args[0], args[1][: len(args[1]) // 2])
        raise OSError(code, os.strerror(code))

    return strike


@pytest.mark.slow
@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize(
    "strike",
    [
        pytest.param(fail_with(errno.EIO), id="EIO"),
        pytest.param(fail_with(errno.EINTR), id="EINTR"),
        pytest.param(fail_with(errno.EACCES), id="EACCES"),
        pytest.param(fail_with(errno.EMFILE), id="EMFILE"),
        pytest.param(after_half_a_write(errno.ENOSPC), id="ENOSPC"),
    ],
)
def test_a_fault_at_each_operation_is_a_typed_error_and_loses_nothing(
    memory_path: Path,
    strike: Callable[..., Any],
    sticky: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, scratch = memory_path / "base", memory_path / "scratch"
    prepare_base(base)
    old, new = make_state(2, 3), make_state(3, 14, 5)
    monkeypatch.setattr(run_checkpoint, "MAX_SHARD_BYTES", 120)
    num_operations = count_operations(base, scratch, new)
    assert num_operations > 50
    num_refused = 0
    for k in range(num_operations):
        shutil.copytree(base, scratch)
        faulty = Counting(k, strike, sticky=sticky)
        caplog.clear()
        try:
            save_checkpoint(scratch, new, keep=2, files=faulty)
        except CheckpointError as error:
            num_refused += 1
            message = str(error)
            assert str(scratch) in message
            if isinstance(error, DiskSpaceError):
                assert "bytes are free" in message or "unknown number of bytes" in message
                assert "untouched" in message
            expected = new if (scratch / "step-00000003").exists() else old
            assert {1, 2} <= set(list_checkpoints(scratch))
            if not sticky and "step-00000003.tmp-0123" not in leftovers(scratch):
                assert not leftovers(scratch)
        else:
            expected = new
            assert faulty.calls[k] in {"unlink", "rmdir", "rename"}
            assert str(scratch) in caplog.text
        assert_equal(load_newest_checkpoint(scratch, on_damage=refuse_damage), expected)
        assert save_checkpoint(scratch, new, keep=2, files=Unsynced()).is_dir()
        assert_equal(load_newest_checkpoint(scratch, on_damage=refuse_damage), new)
        assert not leftovers(scratch)
        shutil.rmtree(scratch)
    assert num_refused > 35


def test_everything_is_synced_before_it_gets_its_name_and_the_name_afterwards(tmp_path: Path) -> None:
    class Recording(FileSystem):
        def __init__(self) -> None:
            self.open_paths: dict[int, Path] = {}
            self.synced: list[Path] = []
            self.synced_before_rename: list[Path] = []

        def system_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if call is os.rename:
                assert {path.name for path in args[0].iterdir()} == {
                    path.name for path in self.synced if path.parent == args[0]
                }
                assert self.synced[-1] == args[0]
                self.synced_before_rename = list(self.synced)
            result = super().system_call(call, *args, **kwargs)
            if call is os.open:
                self.open_paths[result] = args[0]
            elif call is os.fsync:
                self.synced.append(self.open_paths[args[0]])
            elif call is os.write:
                assert self.open_paths[args[0]] not in self.synced
            return result

    files = Recording()
    save_checkpoint(tmp_path / "run", make_state(1), keep=1, files=files)
    names = [path.name for path in files.synced_before_rename[1:-1]]
    assert names[:2] == ["tensors-00000.safetensors", "state.json"]
    assert names[2].startswith("manifest-")
    assert files.synced[0] == tmp_path
    assert files.synced[len(files.synced_before_rename) :] == [tmp_path / "run"]


def test_short_writes_save_correctly(tmp_path: Path) -> None:
    def short(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return os.write(args[0], args[1][:5]) if call is os.write else call(*args, **kwargs)

    save_checkpoint(tmp_path, make_state(1, 2, 20), keep=2, files=Counting(0, short, sticky=True))
    assert_equal(load_newest_checkpoint(tmp_path, on_damage=refuse_damage), make_state(1, 2, 20))


def test_an_exception_from_a_signal_handler_removes_the_unfinished_folder(tmp_path: Path) -> None:
    def interrupt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    save_checkpoint(tmp_path, make_state(1), keep=2)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, make_state(2), keep=2, files=Counting(6, interrupt))
    assert os.listdir(tmp_path) == ["step-00000001"]


def kill_strikes() -> dict[str, Callable[..., Any]]:
    def die(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_midway(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if call is os.write:
            os.write(args[0], args[1][: len(args[1]) // 2])
        else:
            call(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    return {"before": die, "midway": die_midway}


def run_kills(directory: Path) -> dict[str, int]:
    """Kills a forked child at each operation of a save; returns how often the old and the new one loaded."""
    base, scratch = directory / "base", directory / "scratch"
    prepare_base(base)
    old, new = make_state(2, 3), make_state(3, 44, 5)
    outcomes = {"old": 0, "new": 0, "survived": 0, "lost": 0}
    num_operations = count_operations(base, scratch, new)
    for strike in kill_strikes().values():
        for k in range(num_operations):
            shutil.copytree(base, scratch)
            child = os.fork()
            if child == 0:
                save_checkpoint(scratch, new, keep=2, files=Counting(k, strike))
                os._exit(0)
            _, status = os.waitpid(child, 0)
            outcomes["survived"] += not os.WIFSIGNALED(status)
            try:
                found = load_newest_checkpoint(scratch, on_damage=refuse_damage)
                assert_equal(found, new if found.step == 3 else old)
                outcomes["new" if found.step == 3 else "old"] += 1
                save_checkpoint(scratch, new, keep=2, files=Unsynced())
                assert_equal(load_newest_checkpoint(scratch, on_damage=refuse_damage), new)
                assert not leftovers(scratch)
                assert list_checkpoints(scratch) == [2, 3]
            except (CheckpointError, AssertionError):
                outcomes["lost"] += 1
            shutil.rmtree(scratch)
    return outcomes


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_each_operation_leaves_the_old_or_the_new(memory_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__, str(memory_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    assert outcomes["lost"] == outcomes["survived"] == 0
    assert outcomes["old"] + outcomes["new"] >= 300
    assert outcomes["new"] > 5


def mutate(folder: Path, older: Path, chance: random.Random) -> str:
    """Damages a checkpoint in one random way and says how."""
    file = chance.choice(sorted(folder.iterdir()))
    contents = bytearray(file.read_bytes())
    kind = chance.choice(
        ["flip", "flip", "zero", "truncate", "extend", "delete", "stale", "swap", "manifest"]
    )
    match kind:
        case "flip":
            contents[chance.randrange(len(contents))] ^= 1 << chance.randrange(8)
            file.write_bytes(contents)
        case "zero":
            file = chance.choice(sorted(folder.glob("*.safetensors")))
            contents = bytearray(file.read_bytes())
            start = chance.randrange(0, len(contents), 4096)
            contents[start : start + 4096] = bytes(len(contents[start : start + 4096]))
            file.write_bytes(contents)
        case "truncate":
            file.write_bytes(contents[: chance.randrange(len(contents))])
        case "extend":
            file.write_bytes(contents + bytes(chance.randrange(1, 5000)))
        case "delete":
            file.unlink()
        case "stale":
            stale = chance.choice(sorted(older.iterdir()))
            shutil.copy(stale, folder / stale.name)
        case "swap":
            first, second = sorted(folder.glob("*.safetensors"))[:2]
            second.rename(folder / "other")
            first.rename(second)
            (folder / "other").rename(first)
        case "manifest":
            edit_manifest(folder, chance)
    return f"{kind} {file.name}"


def edit_manifest(folder: Path, chance: random.Random) -> None:
    """Changes one value and names the file after its new digest, as a careless tool would."""
    path = next(folder.glob("manifest-*.json"))
    manifest = json.loads(path.read_text())
    file = chance.choice(sorted(manifest["files"]))
    tensor = chance.choice(sorted(manifest["tensors"]))
    edits: list[tuple[dict[str, Any], str, Any]] = [
        (manifest, "step", manifest["step"] + 1),
        (manifest, "tokens", -1),
        (manifest, "tokens", manifest["tokens"] + 1),
        (manifest, "version", "1"),
        (manifest, "format", "other"),
        (manifest, "files", []),
        (manifest, "tensors", {}),
        (manifest["files"], file, None),
        (manifest["files"], "../escape", manifest["files"][file]),
        (manifest["files"][file], "size", 2**70),
        (manifest["files"][file], "size", True),
        (manifest["files"][file], "sha256", "0" * 64),
        (manifest["files"][file], "sha256", "short"),
        (manifest["tensors"][tensor], "dtype", "I32"),
        (manifest["tensors"][tensor], "dtype", "object"),
        (manifest["tensors"][tensor], "shape", [2**62, 2**62, 0]),
        (manifest["tensors"][tensor], "shape", [3, 300]),
        (manifest["tensors"][tensor], "shape", [1.5]),
        (manifest["tensors"][tensor], "file", "state.json"),
        (manifest["tensors"], "invented", manifest["tensors"][tensor]),
    ]
    target, key, value = chance.choice(edits)
    target[key] = value
    write_manifest(folder, json.dumps(manifest).encode())


def write_manifest(folder: Path, text: bytes) -> None:
    for old in folder.glob("manifest-*.json"):
        old.unlink()
    (folder / f"manifest-{hashlib.sha256(text).hexdigest()[:16]}.json").write_bytes(text)


@pytest.mark.parametrize(
    "num_mutations", [300, pytest.param(50_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
def test_each_mutation_is_detected_and_the_previous_one_loads(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, num_mutations: int
) -> None:
    monkeypatch.setattr(run_checkpoint, "MAX_SHARD_BYTES", 8000)
    base, scratch = memory_path / "base", memory_path / "scratch"
    for step in (1, 2):
        save_checkpoint(base, make_state(step), keep=2, files=Unsynced())
    for seed in range(num_mutations):
        shutil.copytree(base, scratch)
        newest = scratch / "step-00000002"
        what = mutate(newest, scratch / "step-00000001", random.Random(seed))
        messages: list[str] = []
        found = load_newest_checkpoint(scratch, on_damage=messages.append)
        assert len(messages) == 1, what
        assert str(newest) in messages[0]
        assert_equal(found, make_state(1))
        with pytest.raises(DamagedCheckpointError, match="is damaged"):
            verify_checkpoint(newest)
        shutil.rmtree(scratch)


def test_when_all_are_damaged_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        path = save_checkpoint(tmp_path, make_state(step), keep=2)
        flip_byte(path / "state.json", 3)
    with pytest.raises(DamagedCheckpointError, match=r"step-00000002.*sha256 .*step-00000001.*sha256 "):
        load_newest_checkpoint(tmp_path, on_damage=lambda message: None)


def header(text: str, claimed: int | None = None) -> bytes:
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "shard",
    [
        b"",
        b"1234567",
        header("{}"),
        header("{}", 2**63),
        header("{}", 200_000_000) + bytes(24),
        header("[" * 100_000),
        header("[]") + bytes(24),
        header('{"a":1}') + bytes(24),
        header('{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}') + bytes(23),
        header('{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}') + bytes(25),
        header('{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28]}}') + bytes(28),
        header('{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[-24,0]}}') + bytes(24),
        header('{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24,48]}}') + bytes(24),
        header('{"a":{"dtype":"I32","shape":[2,3],"data_offsets":[0,24]}}') + bytes(24),
        header('{"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}') + bytes(24),
        header('{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,' + "9" * 5000 + "]}}") + bytes(24),
        header(
            '{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
            '"b":{"dtype":"U8","shape":[8],"data_offsets":[16,24]}}'
        )
        + bytes(24),
    ],
)
def test_a_forged_shard_with_right_digests_is_damage_and_nothing_else(tmp_path: Path, shard: bytes) -> None:
    path = save_checkpoint(tmp_path, RunState(1, 1, {"a": torch.zeros(2, 3)}, {}), keep=1)
    name = "tensors-00000.safetensors"
    (path / name).write_bytes(shard)
    manifest = json.loads(next(path.glob("manifest-*.json")).read_text())
    manifest["files"][name] = {"size": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}
    write_manifest(path, json.dumps(manifest).encode())
    with pytest.raises(DamagedCheckpointError, match=name):
        verify_checkpoint(path)
    with pytest.raises(DamagedCheckpointError, match=name):
        load_newest_checkpoint(tmp_path, on_damage=lambda message: None)


@pytest.mark.parametrize("text", [b"", b"null", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"step": 1e999}'])
def test_a_forged_manifest_is_damage_and_nothing_else(tmp_path: Path, text: bytes) -> None:
    path = save_checkpoint(tmp_path, make_state(1), keep=1)
    write_manifest(path, text)
    with pytest.raises(DamagedCheckpointError, match="manifest"):
        verify_checkpoint(path)


def test_a_manifest_is_checked_against_its_name_its_folder_and_its_uniqueness(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_state(1), keep=1)
    renamed = path.rename(tmp_path / "step-00000002")
    with pytest.raises(DamagedCheckpointError, match="it is of step 1, its folder of 2"):
        verify_checkpoint(renamed)
    renamed.rename(path)
    manifest = next(path.glob("manifest-*.json"))
    contents = manifest.read_bytes()
    manifest.write_bytes(contents + b" ")
    with pytest.raises(DamagedCheckpointError, match="its sha256 begins with"):
        verify_checkpoint(path)
    manifest.write_bytes(contents)
    (path / "manifest-0123456789abcdef.json").write_bytes(b"{}")
    with pytest.raises(DamagedCheckpointError, match="2 manifests instead of one"):
        verify_checkpoint(path)


def test_a_shape_that_overflows_is_damage_even_where_it_holds_no_element(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, RunState(1, 1, {"a": torch.zeros(0)}, {}), keep=1)
    name, shape = "tensors-00000.safetensors", [2**62, 2**62, 0]
    entry = {"dtype": "F32", "shape": shape}
    shard = header(json.dumps({"a": entry | {"data_offsets": [0, 0]}}))
    (path / name).write_bytes(shard)
    manifest = json.loads(next(path.glob("manifest-*.json")).read_text())
    manifest["files"][name] = {"size": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}
    manifest["tensors"]["a"] = entry | {"file": name}
    write_manifest(path, json.dumps(manifest).encode())
    with pytest.raises(DamagedCheckpointError, match="too large"):
        load_newest_checkpoint(tmp_path, on_damage=lambda message: None)


def test_a_newer_format_is_not_called_damaged(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_state(1), keep=1)
    manifest = json.loads(next(path.glob("manifest-*.json")).read_text())
    write_manifest(path, json.dumps(manifest | {"version": 2}).encode())
    with pytest.raises(CheckpointError, match="upgrade") as caught:
        load_newest_checkpoint(tmp_path, on_damage=refuse_damage)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_a_refusal_to_read_is_no_reason_to_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    for step in (1, 2):
        save_checkpoint(tmp_path, make_state(step), keep=2)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"step-00000002.*Permission denied"):
        load_newest_checkpoint(tmp_path, on_damage=refuse_damage)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_really_full_disk(tmp_path: Path) -> None:
    class Optimistic(FileSystem):
        """Sees the disk as large before writing, so that the disk itself has to refuse."""

        def __init__(self) -> None:
            self.asked = 0

        def free_bytes(self, path: Path) -> int:
            self.asked += 1
            return 2**40 if self.asked == 1 else super().free_bytes(path)

    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        small, large = make_state(1), make_state(2, 4, 40_000)
        save_checkpoint(tmp_path, small, keep=2)
        with pytest.raises(DiskSpaceError, match="are untouched"):
            save_checkpoint(tmp_path, large, keep=2)
        with pytest.raises(DiskSpaceError, match=r"No space left.*needs 1920\d\d\d bytes.*are untouched"):
            save_checkpoint(tmp_path, large, keep=2, files=Optimistic())
        assert os.listdir(tmp_path) == ["step-00000001"]
        assert_equal(load_newest_checkpoint(tmp_path, on_damage=refuse_damage), small)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_config_difference_names_each_key_once() -> None:
    saved = {"model": {"num_experts": 16, "top_k": 2, "pattern": [0, 8]}, "only_old": "x", "same": 1}
    current = {"model": {"num_experts": 32, "top_k": 2, "pattern": (0, 8), "new": {"a": True}}, "same": 1}
    assert describe_config_difference(saved, current).splitlines() == [
        'model.new: checkpoint not set, now {"a": true}',
        "model.num_experts: checkpoint 16, now 32",
        'only_old: checkpoint "x", now not set',
    ]
    assert describe_config_difference(saved, saved) == ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable()
    run_checkpoint.MAX_SHARD_BYTES = 120
    sys.stdout.write(json.dumps(run_kills(Path(sys.argv[1]))))


def test_a_selection_loads_some_tensors_and_casts_them(tmp_path: Path) -> None:
    tensors = {"model.a": torch.randn(3, 4), "optimizer.a": torch.randn(3, 4), "model.n": torch.tensor([7])}
    save_checkpoint(tmp_path, RunState(1, 2, tensors, {}), keep=2)
    selection = Selection(lambda name: name.startswith("model."), torch.bfloat16)
    loaded = load_newest_checkpoint(tmp_path, on_damage=pytest.fail, selection=selection).tensors
    assert loaded.keys() == {"model.a", "model.n"}
    assert torch.equal(loaded["model.a"], tensors["model.a"].bfloat16())
    assert torch.equal(loaded["model.n"], tensors["model.n"])


def test_tensors_are_read_into_the_memory_that_fits_them(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(3, 4), "c": torch.randn(2), "d": torch.randn(2, 2)}
    save_checkpoint(tmp_path, RunState(1, 2, tensors, {}), keep=2)
    destinations = {
        "a": torch.zeros(3, 4),
        "b": torch.zeros(3, 4, dtype=torch.float64),
        "c": torch.zeros(3),
        "d": torch.zeros(2, 4)[:, ::2],
    }
    loaded = load_newest_checkpoint(
        tmp_path, on_damage=pytest.fail, selection=Selection(destinations=destinations)
    ).tensors
    assert {name for name in loaded if loaded[name] is destinations[name]} == {"a"}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_memory_that_a_damaged_file_has_filled_is_filled_again_from_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        newest = save_checkpoint(tmp_path, RunState(step, 2, {"a": torch.full((4,), step)}, {}), keep=2)
    [shard] = newest.glob("*.safetensors")
    contents = bytearray(shard.read_bytes())
    contents[-1] ^= 1
    shard.write_bytes(contents)
    memory, damages = torch.zeros(4, dtype=torch.int64), []
    selection = Selection(destinations={"a": memory})
    load_newest_checkpoint(tmp_path, on_damage=damages.append, selection=selection)
    assert memory.tolist() == [1] * 4
    assert len(damages) == 1


def test_damage_in_a_tensor_that_is_not_selected_is_found(tmp_path: Path) -> None:
    tensors = {"model.a": torch.zeros(4), "optimizer.a": torch.zeros(4)}
    folder = save_checkpoint(tmp_path, RunState(1, 2, tensors, {}), keep=2)
    [shard] = folder.glob("*.safetensors")
    contents = bytearray(shard.read_bytes())
    contents[-1] ^= 1
    shard.write_bytes(contents)
    damages: list[str] = []
    with pytest.raises(DamagedCheckpointError):
        load_newest_checkpoint(
            tmp_path, on_damage=damages.append, selection=Selection(lambda name: name == "model.a")
        )
    assert len(damages) == 1
