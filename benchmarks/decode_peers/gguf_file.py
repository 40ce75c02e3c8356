"""The weights of an OLMoE folder as a GGUF file for llama.cpp: its names and layout, bf16 or Q8_0. Needs ``gguf``.

Tensors are written one by one, so that memory never holds more than the experts of a layer. Norms and routers are
float32, as llama.cpp's own converter writes them; there is no vocabulary, since tokens are numbers here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from decode_peers.workload import Format
from make_checkpoint import CheckpointShape

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def write_gguf(folder: Path, shape: CheckpointShape, form: Format, path: Path) -> None:
    """Writes the folder's weights to ``path``, which has its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    weights = _FolderWeights(folder)
    writer = gguf.GGUFWriter(draft, "olmoe")
    _add_keys(writer, folder, shape)
    tensors = list(_list_tensors(weights, shape))
    for name, size, _ in tensors:
        kind = _choose_kind(name, form)
        num_bytes = int(np.prod(size)) // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        writer.add_tensor_info(name, size, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, _, read in tensors:
        writer.write_tensor_data(_encode(read(), _choose_kind(name, form)))
    writer.close()
    draft.replace(path)


class _FolderWeights:
    """Tensors of a folder by name."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self._paths = {name: folder / file for name, file in index["weight_map"].items()}

    def read(self, name: str) -> Tensor:
        with safe_open(self._paths[name], framework="pt") as file:
            return file.get_tensor(name)


def _add_keys(writer: gguf.GGUFWriter, folder: Path, shape: CheckpointShape) -> None:
    config = json.loads((folder / "config.json").read_text())
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.expert_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _list_tensors(
    weights: _FolderWeights, shape: CheckpointShape
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """Yields name, shape and reader of each tensor."""
    for name, stored in _MODEL_NAMES.items():
        yield _describe(f"{name}.weight", weights, f"{stored}.weight")
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for name, stored in _LAYER_NAMES.items():
            yield _describe(f"blk.{layer}.{name}.weight", weights, f"{prefix}.{stored}.weight")
        for name, stored in _EXPERT_NAMES.items():
            names = [f"{prefix}.mlp.experts.{e}.{stored}.weight" for e in range(shape.num_experts)]
            yield _describe(f"blk.{layer}.{name}.weight", weights, *names)


def _describe(
    name: str, weights: _FolderWeights, *stored: str
) -> tuple[str, tuple[int, ...], Callable[[], Tensor]]:
    first = tuple(weights.read(stored[0]).shape)
    if len(stored) == 1:
        return name, first, lambda: weights.read(stored[0])
    return name, (len(stored), *first), lambda: torch.stack([weights.read(each) for each in stored])


def _choose_kind(name: str, form: Format) -> gguf.GGMLQuantizationType:
    if "norm" in name or "ffn_gate_inp" in name:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.BF16 if form is Format.BF16 else gguf.GGMLQuantizationType.Q8_0


def _encode(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if kind is gguf.GGMLQuantizationType.BF16:
        return tensor.contiguous().view(torch.uint8).numpy()
    values = tensor.float().numpy()
    return values if kind is gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, kind)
