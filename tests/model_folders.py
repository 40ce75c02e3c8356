"""Small model folders for tests: any family, random weights, and empty giants of which only the headers exist."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint import save_model
from moesys.models import FAMILIES, Decoder, ExpertStorage, Family, initialize_weights, make_skeleton


def find_family(keys: dict[str, Any]) -> Family:
    return next(family for family in FAMILIES if keys["model_type"] in family.model_types)


def make_model(keys: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    """Builds a model whose norms and biases are random too; routers stay in float32, as they do when loaded."""
    model = Decoder(find_family(keys).read_config(keys))
    initialize_weights(model, seed=0, std=0.3)
    generator = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    for name, module in model.named_modules():
        if not name.endswith("router"):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def write_model(
    folder: Path,
    keys: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    experts: ExpertStorage | None = None,
    **extra_config: Any,
) -> Decoder:
    """Writes a model into a new folder and returns it."""
    folder.mkdir(parents=True)
    model = make_model(keys, dtype)
    family = find_family(keys)
    written = family if experts is None else family.with_experts(experts)
    save_model(model, folder, dtype, extra_config, family=written)
    return model


def write_sparse_model(folder: Path, keys: dict[str, Any], num_shards: int) -> int:
    """Writes a model in bfloat16 whose weights take no disk space and read as zeros; returns their bytes."""
    folder.mkdir(parents=True)
    family = find_family(keys)
    tensors = family.list_tensors(make_skeleton(family.read_config(keys)))
    weight_map: dict[str, str] = {}
    total = 0
    for shard_id in range(num_shards):
        name = f"model-{shard_id + 1:05d}-of-{num_shards:05d}.safetensors"
        entries, end = {}, 0
        for stored in tensors[shard_id::num_shards]:
            start, end = end, end + 2 * math.prod(stored.shape)
            entries[stored.name] = {"dtype": "BF16", "shape": stored.shape, "data_offsets": [start, end]}
            weight_map[stored.name] = name
        header = json.dumps(entries).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
        total += end
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(keys | {"dtype": "bfloat16"}))
    return total
