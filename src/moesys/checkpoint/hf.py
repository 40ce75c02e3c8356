"""Model folders in Hugging Face layout, read and written one tensor at a time.

Reading fills the model's own parameters through the views that a `Family` lists; writing streams the same views
into safetensors shards. Peak memory is the model plus one tensor. No code from a checkpoint is ever run.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesys.checkpoint.files import DEFAULT, FileSystem, WrittenFile
from moesys.checkpoint.safetensors_file import write_safetensors
from moesys.errors import ModelFormatError, MoesysError
from moesys.models import FAMILIES, Decoder, DecoderConfig, Family, StoredTensor, choose_family
from moesys.moe import Router

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class ExportedWeights:
    """What was written: the layout's name and each file's size and digest."""

    family: Family
    files: dict[str, WrittenFile]


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Decoder:
    """Loads a checkpoint folder into our decoder.

    dtype: of the weights; None keeps the checkpoint's, float32 where that is float16. Routers are float32 always.
    ``on_progress`` gets (tensors read, tensors). Raises `ModelFormatError` for a folder, family or tensor that does
    not fit.
    """
    keys = read_config_file(folder)
    family = find_family(keys)
    config = _read_decoder_config(folder / "config.json", family, keys)
    with torch.device("meta"):
        model = Decoder(config)
    _materialise(model, dtype or _read_dtype(keys))
    with ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        wanted = family.list_tensors(model, tensors.keys())
        found = {name for name in tensors if not family.layout.ignores(name, config.num_layers)}
        _check_names(folder, found, {stored.name for stored in wanted}, is_tied=config.tie_embeddings)
        for done, stored in enumerate(wanted):
            _copy_tensor(stored, tensors[stored.name])
            on_progress(done + 1, len(wanted))
    return model.eval().requires_grad_(False)


def save_model(
    model: Decoder,
    folder: Path,
    dtype: torch.dtype,
    extra_config: Mapping[str, Any],
    files: FileSystem = DEFAULT,
) -> ExportedWeights:
    """Writes ``config.json`` and the weights of a model as ``dtype`` into an existing folder.

    extra_config: further keys of ``config.json``, such as token ids. Raises `ModelFormatError` when no layout
    holds the model.
    """
    family = choose_family(model.config)
    shards = _plan_shards([(s.name, s.view) for s in family.list_tensors(model)], dtype)
    names = [SINGLE_NAME] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    written = {}
    for name, shard in zip(names, shards, strict=True):
        written[name] = write_safetensors(
            folder / name, shard, dtype=dtype, metadata={"format": "pt"}, files=files
        )
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


def read_config_file(folder: Path) -> dict[str, Any]:
    """Returns the keys of a folder's ``config.json``; raises `ModelFormatError` with what is missing."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelFormatError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
    if (folder / "config.toml").exists() and not path.exists():
        raise ModelFormatError(
            f"{folder} is a training run; export it first: moesys export {folder} --to DIR"
        )
    if not path.exists():
        raise ModelFormatError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    return read_json_object(path)


def find_family(keys: Mapping[str, Any]) -> Family:
    """Returns the family of a ``config.json``; raises `ModelFormatError` listing those that are supported."""
    model_type = str(keys.get("model_type", ""))
    supported = {name: family for family in FAMILIES for name in family.model_types}
    if model_type in supported:
        return supported[model_type]
    nearest = difflib.get_close_matches(model_type, supported, n=1)
    hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
    raise ModelFormatError(
        f"model_type {model_type!r} is not supported (supported: {', '.join(supported)}){hint}"
    )


def _read_decoder_config(path: Path, family: Family, keys: Mapping[str, Any]) -> DecoderConfig:
    try:
        return family.read_config(keys)
    except MoesysError:
        raise
    except KeyError as error:
        raise ModelFormatError(f"{path} lacks the key {error} that a {family.model_type} needs") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelFormatError(f"{path} holds a value that no {family.model_type} has: {error}") from None


def _read_dtype(keys: Mapping[str, Any]) -> torch.dtype:
    name = keys.get("dtype") or keys.get("torch_dtype") or "float32"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}
    if not isinstance(name, str) or name not in dtypes:
        raise ModelFormatError(
            f"dtype {name!r} in config.json is not supported (supported: {', '.join(dtypes)})"
        )
    return dtypes[name]


def _materialise(model: Decoder, dtype: torch.dtype) -> None:
    """Allocates every parameter once, in its final dtype."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = torch.float32 if isinstance(module, Router) else dtype
            setattr(
                module,
                name,
                torch.nn.Parameter(torch.empty(parameter.shape, dtype=kept), requires_grad=False),
            )
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Returns the open safetensors file that holds each tensor."""
    index = folder / INDEX_NAME
    tensors: dict[str, Any] = {}
    for name in _read_index(index) if index.exists() else [SINGLE_NAME]:
        path = folder / name
        if not path.is_file():
            raise ModelFormatError(
                f"{path} is missing; the weights must be safetensors ({SINGLE_NAME}, or shards with {INDEX_NAME}); "
                ".bin files are pickles, which moesys never reads"
            )
        try:
            handle = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ModelFormatError(f"{path} is not a whole safetensors file: {error}") from None
        names = handle.keys()
        if twice := sorted(tensors.keys() & set(names)):
            raise ModelFormatError(f"{path} holds tensors that another shard holds too: {twice[:3]}")
        tensors.update(dict.fromkeys(names, handle))
    return tensors


def _read_index(path: Path) -> list[str]:
    """Returns the shards that an index names; raises `ModelFormatError` for one outside its folder."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelFormatError(f"{path} must map tensors to files in a JSON object named weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ModelFormatError(f"{path} names the file {name!r}; shards must lie in its own folder")
    return names


def _check_names(folder: Path, found: set[str], expected: set[str], *, is_tied: bool) -> None:
    missing = sorted(expected - found)
    surplus = sorted(found - expected - ({"lm_head.weight"} if is_tied else set()))
    if missing or surplus:
        raise ModelFormatError(
            f"the tensors in {folder} do not fit its config.json: "
            f"{len(missing)} missing {missing[:3]}, {len(surplus)} not expected {surplus[:3]}"
        )


def _copy_tensor(stored: StoredTensor, handle: Any) -> None:
    source: Tensor = handle.get_tensor(stored.name)
    if not source.is_floating_point():
        raise ModelFormatError(
            f"{stored.name} is stored as {source.dtype}; quantised weights are not supported"
        )
    stored.fill(source)


def _plan_shards(tensors: list[tuple[str, Tensor]], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and shard_bytes + num_bytes > _MAX_SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor.detach()
        shard_bytes += num_bytes
    return shards


def _write_index(
    folder: Path, names: list[str], shards: list[dict[str, Tensor]], dtype: torch.dtype, files: FileSystem
) -> WrittenFile:
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.numel() * dtype.itemsize for shard in shards for tensor in shard.values())
    return _write_json(
        folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}, files
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the keys of a JSON file; raises `ModelFormatError` for one that holds something else."""
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(keys, dict):
        raise ModelFormatError(f"{path} must hold a JSON object")
    return keys


def _write_json(path: Path, value: Mapping[str, Any], files: FileSystem) -> WrittenFile:
    contents = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    return files.write_new_file(path, [contents], len(contents))
