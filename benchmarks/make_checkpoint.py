"""Writes a model folder with random weights in a family's layout, for benchmarks of loading; never committed.

Run by itself or called by `load.py` and `offload.py`. The weights are drawn from a pool of normal numbers, tensor by
tensor, so that a folder of any size needs little memory; the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

POOL_ELEMENTS = 2**23
SHARD_BYTES = 4 * 2**30
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class CheckpointShape:
    """The sizes of an OLMoE checkpoint (arXiv 2409.02060); the defaults are the published model's."""

    num_layers: int = 16
    hidden_size: int = 2048
    num_heads: int = 16
    num_experts: int = 64
    top_k: int = 8
    expert_size: int = 1024
    vocab_size: int = 50304

    @property
    def config_keys(self) -> dict[str, Any]:
        """What its ``config.json`` holds."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "dtype": "bfloat16",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.expert_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": False,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "eos_token_id": 50279,
            "pad_token_id": 1,
        }

    @property
    def num_parameters(self) -> int:
        per_expert = 3 * self.hidden_size * self.expert_size
        per_layer = (
            self.num_experts * (per_expert + self.hidden_size)
            + 4 * self.hidden_size**2
            + 4 * self.hidden_size
        )
        return self.num_layers * per_layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size


SHAPES = {
    "tiny": CheckpointShape(2, 64, 4, 4, 2, 32, 512),
    "olmoe-2": CheckpointShape(num_layers=2),
    "olmoe-8": CheckpointShape(num_layers=8),
    "olmoe-16": CheckpointShape(),
}


def make_checkpoint(
    folder: Path, shape: CheckpointShape, seed: int = 0, *, embedding_std: float = WEIGHT_STD
) -> None:
    """Writes bf16 shards, their index and ``config.json`` into a new folder; it has its name when it is complete.

    embedding_std: of the token embedding. As small as that of other weights, what attention adds drowns a token's own
    vector, and all tokens of a text go to the same experts.
    """
    import torch

    pool = torch.randn(POOL_ELEMENTS, generator=torch.Generator().manual_seed(seed))
    pools = {std: pool.mul(std).bfloat16() for std in {WEIGHT_STD, embedding_std}}

    draft = folder.with_name(f"{folder.name}.draft")
    draft.mkdir(parents=True)
    shards = _plan_shards(_list_tensors(shape))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file_name, shard in zip(names, shards, strict=True):
        _write_shard(draft / file_name, shard, pools[WEIGHT_STD], pools[embedding_std])
    weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": 2 * shape.num_parameters}, "weight_map": weight_map}
    (draft / "model.safetensors.index.json").write_text(json.dumps(index))
    (draft / "config.json").write_text(json.dumps(shape.config_keys, indent=1))
    draft.rename(folder)


def _write_shard(
    path: Path, shard: Mapping[str, tuple[int, ...]], weights: Tensor, embeddings: Tensor
) -> None:
    import torch

    from moesys.checkpoint.safetensors_file import view_bytes, write_chunks
    from moesys.checkpoint.safetensors_header import TensorRecord

    def draw(name: str) -> Iterator[memoryview]:
        count = math.prod(shard[name])
        if "norm" in name:
            yield view_bytes(torch.ones(count, dtype=torch.bfloat16))
            return
        pool = embeddings if "embed_tokens" in name else weights
        start = zlib.crc32(name.encode()) % POOL_ELEMENTS
        while count:
            chunk = pool[start : start + count]
            yield view_bytes(chunk)
            count, start = count - chunk.numel(), 0

    records = {name: TensorRecord("BF16", shape) for name, shape in shard.items()}
    write_chunks(path, records, draw, metadata={"format": "pt"})


def _list_tensors(shape: CheckpointShape) -> dict[str, tuple[int, ...]]:
    """Returns every tensor's shape, in the order in which transformers writes them."""
    from moesys.models import FAMILIES
    from moesys.models.skeleton import make_skeleton

    family = next(family for family in FAMILIES if family.model_type == "olmoe")
    model = make_skeleton(family.read_config(shape.config_keys))
    return {stored.name: stored.shape for stored in family.list_tensors(model)}


def _plan_shards(tensors: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    shard_bytes = 0
    for name, shape in tensors.items():
        num_bytes = 2 * math.prod(shape)
        if shard_bytes + num_bytes > SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = shape
        shard_bytes += num_bytes
    return shards


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-8")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    make_checkpoint(options.folder, SHAPES[options.shape], options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
