"""Our decoder written as a model folder in Hugging Face layout.

Every tensor is streamed from the views that a `Family` lists into safetensors shards, cast on the way; memory for one
chunk is needed besides the model's. Knows nothing of reading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint.files import DEFAULT, FileSystem, WrittenFile
from moesys.checkpoint.model_files import INDEX_NAME, SINGLE_NAME
from moesys.checkpoint.safetensors_file import record_tensor, write_chunks
from moesys.checkpoint.stored_chunks import iterate_chunks
from moesys.errors import ModelFormatError
from moesys.models import Decoder, DecoderConfig, Family, StoredTensor, choose_family

DEFAULT_SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class ExportedWeights:
    """What was written: the layout's name and each file's size and digest."""

    family: Family
    files: dict[str, WrittenFile]


def save_model(
    model: Decoder,
    folder: Path,
    dtype: torch.dtype,
    extra_config: Mapping[str, Any],
    files: FileSystem = DEFAULT,
    *,
    family: Family | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> ExportedWeights:
    """Writes ``config.json`` and the weights of a model as ``dtype`` into an existing folder.

    extra_config: further keys of ``config.json``, such as token ids. family: whose layout is written; None takes the
    first that holds the model. max_shard_bytes: of the weights in one file, unless a single tensor is larger. Raises
    `ModelFormatError`, before anything is written, when no layout holds the model, or the one asked for does not, and
    for a model with int8 weights.
    """
    family = _choose_family(model.config, family)
    shards = _plan_shards(family.list_tensors(model), dtype, max_shard_bytes)
    names = [SINGLE_NAME] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    written = {
        name: _write_shard(folder / name, shard, dtype, files)
        for name, shard in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        written[INDEX_NAME] = _write_index(folder, names, shards, dtype, files)
    keys = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        **family.write_config(model.config),
        **extra_config,
    }
    written["config.json"] = _write_json(folder / "config.json", keys, files)
    return ExportedWeights(family, written)


def _choose_family(config: DecoderConfig, wanted: Family | None) -> Family:
    if wanted is None:
        return choose_family(config)
    if misfits := wanted.find_misfits(config):
        raise ModelFormatError(
            f"the layout {wanted.model_type} does not hold this model: {'; '.join(misfits)}"
        )
    return wanted


def _plan_shards(
    tensors: list[StoredTensor], dtype: torch.dtype, max_shard_bytes: int
) -> list[dict[str, StoredTensor]]:
    shards: list[dict[str, StoredTensor]] = [{}]
    shard_bytes = 0
    for stored in tensors:
        num_bytes = stored.view.numel() * (stored.dtype or dtype).itemsize
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][stored.name] = stored
        shard_bytes += num_bytes
    return shards


def _write_shard(
    path: Path, shard: Mapping[str, StoredTensor], dtype: torch.dtype, files: FileSystem
) -> WrittenFile:
    records = {}
    for name, stored in shard.items():
        record = record_tensor(name, stored.view, (stored.dtype or dtype))
        records[name] = replace(record, shape=stored.shape)
    return write_chunks(
        path,
        records,
        lambda name: iterate_chunks(shard[name], records[name].torch_dtype),
        metadata={"format": "pt"},
        files=files,
    )


def _write_index(
    folder: Path,
    names: list[str],
    shards: list[dict[str, StoredTensor]],
    dtype: torch.dtype,
    files: FileSystem,
) -> WrittenFile:
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(
        stored.view.numel() * (stored.dtype or dtype).itemsize
        for shard in shards
        for stored in shard.values()
    )
    return _write_json(
        folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}, files
    )


def _write_json(path: Path, value: Mapping[str, Any], files: FileSystem) -> WrittenFile:
    contents = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    return files.write_new_file(path, [contents], len(contents))
