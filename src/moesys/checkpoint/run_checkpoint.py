"""Training checkpoints that survive kill -9, full disks and flipped bits: always the old one or the new one.

Knows named tensors and JSON; knows nothing of models, optimizers or ranks: one process writes one folder. The
idea: a checkpoint is built in a ``.tmp-`` folder, its manifest (sizes and sha256 of every file) last and with
its own sha256 in its name; it is read back, and only then renamed to ``step-00000123``. Whoever reads one
checks all of that before a tensor reaches the caller, and takes the one before it when anything differs.

    step-00000123/
      tensors-00000.safetensors      at most 1 GiB each, unless one tensor is larger
      state.json                     step, tokens and the caller's metadata
      manifest-0123456789abcdef.json
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from moesys.checkpoint.files import DEFAULT, FileSystem, HashedReader, WrittenFile, explain_read_errors
from moesys.checkpoint.json_object import parse_natural, parse_object
from moesys.checkpoint.safetensors_file import (
    EVERYTHING,
    Selection,
    read_safetensors,
    record_tensor,
    verify_safetensors,
    write_safetensors,
)
from moesys.checkpoint.safetensors_header import TensorRecord, parse_record
from moesys.errors import CheckpointError, DamagedCheckpointError, DiskSpaceError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

MAX_SHARD_BYTES = 2**30
MAX_MANIFEST_BYTES = 100_000_000
FREE_SPACE_FACTOR = 1.2

_FORMAT = "moesys-run-checkpoint"
_VERSION = 1
_STATE_NAME = "state.json"
_STEP_PATTERN = re.compile(r"step-([0-9]{8,})")
_UNFINISHED_PATTERN = re.compile(r"step-[0-9]{8,}\.tmp-[0-9a-f]+")
_MANIFEST_PATTERN = re.compile(r"manifest-([0-9a-f]{16})\.json")
_SHARD_PATTERN = re.compile(r"tensors-[0-9]{5,}\.safetensors")
_SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to go on.

    ``tensors`` have flat names such as ``model.layers.0.norm.weight``; on any device when saved, on the CPU
    when loaded. ``metadata`` is JSON that survives a round trip: string keys, lists, no tuples, no NaN.
    """

    step: int
    tokens: int
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, JSON]


_Shards: TypeAlias = Mapping[str, Mapping[str, TensorRecord]]
"""Per file name, its tensors by name."""


@dataclass(frozen=True)
class _Draft:
    """A state as it will lie on the disk, before anything is written."""

    state: RunState
    state_text: bytes
    shards: _Shards

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole checkpoint, headers and manifest estimated at 400 per tensor."""
        records = [record for shard in self.shards.values() for record in shard.values()]
        return len(self.state_text) + sum(record.size_bytes + 400 for record in records)


@dataclass(frozen=True)
class _Manifest:
    step: int
    tokens: int
    files: Mapping[str, WrittenFile]
    shards: _Shards


def list_checkpoints(directory: Path) -> list[int]:
    """Returns the steps that have a checkpoint folder, ascending, without looking inside the folders."""
    if not directory.is_dir():
        return []
    with explain_read_errors(directory):
        names = [entry.name for entry in directory.iterdir() if entry.is_dir()]
    steps = (_step_of(name) for name in names)
    return sorted(step for step in steps if step is not None)


def save_checkpoint(directory: Path, state: RunState, *, keep: int, files: FileSystem = DEFAULT) -> Path:
    """Saves a run durably under ``directory`` and returns the checkpoint's folder.

    On top of the state itself it needs the memory of the largest tensor, and that only for tensors that are
    not contiguous on the CPU. When an intact checkpoint of this step exists already, that one is returned; a
    damaged one is set aside under another name. Once the new one is on the disk and was read back,
    checkpoints older than the ``keep`` newest intact ones are deleted (those that stay are read back too);
    trouble with deleting is logged and not raised.

    Raises DiskSpaceError or another CheckpointError; the checkpoints that were there before are then
    untouched and the unfinished one is removed. One process at a time may save to a directory.
    """
    if keep < 1:
        raise CheckpointError(
            f"keep ({keep}) must be at least 1; use 2 or more to survive a damaged checkpoint"
        )
    draft = _Draft(state, _encode_state(state), _plan_shards(state.tensors))
    final = directory / _folder_name(state.step)
    try:
        files.ensure_directory(directory)
        _remove_unfinished(directory, files)
        if not _is_intact_or_set_aside(final, files):
            _require_free_space(directory, draft.size_bytes, files)
            _write_verified(final, draft, files)
        files.fsync_directory(directory)
    except DiskSpaceError as error:
        raise DiskSpaceError(
            f"{error}; the whole checkpoint {final.name} has {draft.size_bytes} bytes, and the older "
            f"checkpoints in {directory} are untouched"
        ) from error
    _remove_older(directory, state.step, keep, files)
    return final


def load_newest_checkpoint(
    directory: Path, *, on_damage: Callable[[str], None], selection: Selection = EVERYTHING
) -> RunState:
    """Loads the newest checkpoint that is exactly what was saved, its tensors on the CPU.

    Each file is read once, hashed while it is read, also where ``selection`` leaves tensors out.
    A checkpoint that differs from its manifest in anything
    is described to ``on_damage`` (which file, what was expected and found), and the one before it is taken.

    Raises DamagedCheckpointError when none is intact, and CheckpointError when there is none or when the
    system refuses to read one (permissions, too many open files), which is no reason to fall back.
    """
    damages: list[str] = []
    for step in reversed(list_checkpoints(directory)):
        try:
            return _load(directory / _folder_name(step), selection)
        except DamagedCheckpointError as error:
            damages.append(str(error))
            on_damage(str(error))
    if damages:
        raise DamagedCheckpointError(
            f"none of the {len(damages)} checkpoints in {directory} is intact: {'; '.join(damages)}; "
            "restore one from a backup or start the run anew in another directory"
        )
    raise CheckpointError(
        f"there is no checkpoint in {directory}; name the directory that holds folders such as "
        f"{_folder_name(100)}, or start the run anew"
    )


def verify_checkpoint(path: Path) -> None:
    """Reads a checkpoint's folder completely and raises DamagedCheckpointError if anything differs from its
    manifest; needs no memory for the tensors."""
    _verify(path, _step_of(path.name))


def describe_config_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Returns one line per setting that differs, as ``model.num_experts: checkpoint 16, now 32``; empty when
    the two are equal."""
    return "\n".join(_differing_lines(saved, current, ""))


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(folder_name: str) -> int | None:
    match = _STEP_PATTERN.fullmatch(folder_name)
    if match is None or len(folder_name) > 24:
        return None
    step = int(match[1])
    return step if _folder_name(step) == folder_name else None


def _differing_lines(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str) -> Iterator[str]:
    def text(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key], sort_keys=True, default=str) if key in values else "not set"

    for key in sorted({*saved, *current}):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differing_lines(old, new, f"{prefix}{key}.")
        elif text(saved, key) != text(current, key):
            yield f"{prefix}{key}: checkpoint {text(saved, key)}, now {text(current, key)}"


def _encode_state(state: RunState) -> bytes:
    if state.step < 0 or state.tokens < 0:
        raise CheckpointError(f"step ({state.step}) and tokens ({state.tokens}) must not be negative")
    contents = {"step": state.step, "tokens": state.tokens, "metadata": dict(state.metadata)}
    try:
        text = json.dumps(contents, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"metadata must be JSON: {error}; turn that value into numbers or text"
        ) from error
    if json.loads(text) != contents:
        raise CheckpointError(
            "metadata must survive JSON unchanged, and does not; use lists instead of tuples and text as keys"
        )
    return text.encode()


def _plan_shards(tensors: Mapping[str, torch.Tensor]) -> _Shards:
    """Fills shards in the order given."""
    shards: list[dict[str, TensorRecord]] = []
    filled_bytes = 0
    for name, tensor in tensors.items():
        record = record_tensor(name, tensor)
        if not shards or filled_bytes + record.size_bytes > MAX_SHARD_BYTES:
            shards.append({})
            filled_bytes = 0
        shards[-1][name] = record
        filled_bytes += record.size_bytes
    return {f"tensors-{index:05d}.safetensors": shard for index, shard in enumerate(shards)}


def _require_free_space(directory: Path, expected_bytes: int, files: FileSystem) -> None:
    needed_bytes = math.ceil(expected_bytes * FREE_SPACE_FACTOR)
    free_bytes = files.free_bytes(directory)
    if free_bytes < needed_bytes:
        raise DiskSpaceError(
            f"a checkpoint in {directory} needs {needed_bytes} bytes ({FREE_SPACE_FACTOR} x its size) and "
            f"{free_bytes} bytes are free; free some space, keep fewer checkpoints or use another disk"
        )


def _is_intact_or_set_aside(final: Path, files: FileSystem) -> bool:
    if not final.exists():
        return False
    try:
        verify_checkpoint(final)
    except DamagedCheckpointError as error:
        aside = final.with_name(f"{final.name}.damaged-{secrets.token_hex(4)}")
        files.rename(final, aside)
        files.fsync_directory(final.parent)
        _log.warning("%s; set aside as %s, delete it when you no longer need it", error, aside)
        return False
    return True


def _write_verified(final: Path, draft: _Draft, files: FileSystem) -> None:
    temporary = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
    files.make_directory(temporary)
    try:
        _write_contents(temporary, draft, files)
        files.fsync_directory(temporary)
        _verify(temporary, draft.state.step)
        files.rename(temporary, final)
    except BaseException:
        with suppress(CheckpointError):
            files.remove_tree(temporary)
        raise


def _write_contents(folder: Path, draft: _Draft, files: FileSystem) -> None:
    written: dict[str, WrittenFile] = {}
    for name, records in draft.shards.items():
        shard = {tensor_name: draft.state.tensors[tensor_name] for tensor_name in records}
        written[name] = write_safetensors(folder / name, shard, files=files)
    written[_STATE_NAME] = files.write_new_file(
        folder / _STATE_NAME, [draft.state_text], len(draft.state_text)
    )
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": draft.state.step,
        "tokens": draft.state.tokens,
        "files": {name: {"size": file.size_bytes, "sha256": file.sha256} for name, file in written.items()},
        "tensors": {
            name: {"file": file_name, "dtype": record.dtype, "shape": record.shape}
            for file_name, records in draft.shards.items()
            for name, record in records.items()
        },
    }
    text = json.dumps(manifest, indent=1).encode()
    digest = hashlib.sha256(text).hexdigest()
    files.write_new_file(folder / f"manifest-{digest[:16]}.json", [text], len(text))


def _remove_unfinished(directory: Path, files: FileSystem) -> None:
    with explain_read_errors(directory):
        leftovers = [entry for entry in directory.iterdir() if _UNFINISHED_PATTERN.fullmatch(entry.name)]
    for leftover in leftovers:
        _remove_or_log(leftover, files)


def _remove_older(directory: Path, step: int, keep: int, files: FileSystem) -> None:
    """Deletes what is older than the ``keep`` newest intact checkpoints up to ``step``, itself intact.

    Those that stay are read back as well, so that a damaged one never counts, but only when there are so many
    that something may be deleted.
    """
    older = [other for other in reversed(list_checkpoints(directory)) if other < step]
    if len(older) < keep:
        return
    intact = 1
    for path in (directory / _folder_name(other) for other in older):
        if intact < keep:
            intact += _is_intact(path)
        else:
            _remove_checkpoint(path, files)


def _remove_checkpoint(path: Path, files: FileSystem) -> None:
    """Takes the name away first: a half-deleted folder must not look like a damaged checkpoint."""
    condemned = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        files.rename(path, condemned)
    except CheckpointError as error:
        _log.warning("the old checkpoint %s stays: %s", path, error)
    else:
        _remove_or_log(condemned, files)


def _is_intact(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        _log.warning("%s; not counted among the checkpoints to keep", error)
        return False
    return True


def _remove_or_log(path: Path, files: FileSystem) -> None:
    try:
        files.remove_tree(path)
    except CheckpointError as error:
        _log.warning("%s; %s is of no use any more, delete it by hand", error, path)


def _load(path: Path, selection: Selection) -> RunState:
    manifest = _read_manifest(path, _step_of(path.name))
    metadata = _read_metadata(path, manifest)
    tensors: dict[str, torch.Tensor] = {}
    for file_name, records in manifest.shards.items():
        tensors |= read_safetensors(path / file_name, manifest.files[file_name], records, selection)
    return RunState(manifest.step, manifest.tokens, tensors, metadata)


def _verify(path: Path, step: int | None) -> None:
    manifest = _read_manifest(path, step)
    _read_metadata(path, manifest)
    for file_name, records in manifest.shards.items():
        verify_safetensors(path / file_name, manifest.files[file_name], records)


def _read_manifest(folder: Path, step: int | None) -> _Manifest:
    with explain_read_errors(folder):
        found = [entry for entry in folder.iterdir() if _MANIFEST_PATTERN.fullmatch(entry.name)]
        if len(found) != 1:
            raise DamagedCheckpointError(f"{folder} is damaged: it has {len(found)} manifests instead of one")
        path = found[0]
        size_bytes = path.stat().st_size
        if size_bytes > MAX_MANIFEST_BYTES:
            raise DamagedCheckpointError(
                f"{path} is damaged: {size_bytes} bytes, and a manifest has at most {MAX_MANIFEST_BYTES}"
            )
        contents = path.read_bytes()
    expected, digest = path.stem.removeprefix("manifest-"), hashlib.sha256(contents).hexdigest()[:16]
    if digest != expected:
        raise DamagedCheckpointError(
            f"{path} is damaged: its sha256 begins with {digest}, not with {expected}"
        )
    try:
        manifest = _parse_manifest(parse_object(contents))
    except ValueError as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from error
    if step is not None and manifest.step != step:
        raise DamagedCheckpointError(
            f"{path} is damaged: it is of step {manifest.step}, its folder of {step}"
        )
    return manifest


def _read_metadata(folder: Path, manifest: _Manifest) -> Mapping[str, JSON]:
    with HashedReader(folder / _STATE_NAME, manifest.files[_STATE_NAME]) as reader:
        contents = reader.read(reader.left_bytes)
        reader.check_digest()
        try:
            state = parse_object(contents)
        except ValueError as error:
            raise reader.damaged(str(error)) from error
        metadata = state.get("metadata")
        if not isinstance(metadata, dict):
            raise reader.damaged("its metadata is not an object")
        if (state.get("step"), state.get("tokens")) != (manifest.step, manifest.tokens):
            raise reader.damaged(
                f"step {state.get('step')} and tokens {state.get('tokens')} are not the manifest's "
                f"{manifest.step} and {manifest.tokens}"
            )
    return metadata


def _parse_manifest(contents: Mapping[str, Any]) -> _Manifest:
    if contents.get("format") != _FORMAT:
        raise ValueError(f"its format is {contents.get('format')!r}, not {_FORMAT!r}")
    version = parse_natural("version", contents.get("version"))
    if version > _VERSION:
        raise CheckpointError(
            f"this checkpoint has format version {version} and this moesys reads up to {_VERSION}; "
            "pip install --upgrade moesys"
        )
    files, tensors = contents.get("files"), contents.get("tensors")
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        raise ValueError("it does not list files and tensors")
    written = {name: _parse_written_file(name, entry) for name, entry in files.items()}
    if _STATE_NAME not in written:
        raise ValueError(f"it does not list {_STATE_NAME}")
    shards: dict[str, dict[str, TensorRecord]] = {name: {} for name in written if name != _STATE_NAME}
    for name, entry in tensors.items():
        match entry:
            case {"file": str(file_name), "dtype": str(dtype), "shape": list(shape)} if file_name in shards:
                shards[file_name][name] = parse_record(name, dtype, shape)
            case _:
                raise ValueError(f"it has no file, dtype and shape for {name}")
    step, tokens = (parse_natural(key, contents.get(key)) for key in ("step", "tokens"))
    return _Manifest(step, tokens, written, shards)


def _parse_written_file(name: str, entry: Any) -> WrittenFile:
    if name != _STATE_NAME and not _SHARD_PATTERN.fullmatch(name):
        raise ValueError(f"it lists a file {name!r} that a checkpoint does not have")
    match entry:
        case {"size": size_bytes, "sha256": str(sha256)} if _SHA256_PATTERN.fullmatch(sha256):
            return WrittenFile(parse_natural(f"size of {name}", size_bytes), sha256)
    raise ValueError(f"it has no size and sha256 for {name}")
