"""Model folders in Hugging Face layout, small enough to train in a test."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken

from family_keys import FAMILY_KEYS
from moesys.checkpoint import save_model
from moesys.config import ModelConfig
from moesys.data import train_tokenizer
from moesys.models import Decoder, DecoderConfig, Family, choose_family, initialize_weights
from moesys.training.build import build_decoder_config

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 310
TOKEN_IDS = {"bos_token_id": None, "eos_token_id": 7, "pad_token_id": 3}
GENERATION = {"eos_token_id": [7, 0], "temperature": 0.6, "do_sample": True}


def make_model_folder(folder: Path, *, max_positions: int = 64, **shape: object) -> Path:
    """Writes a tiny Qwen3-MoE, or what ``shape`` (keys of the config's model section) makes of it."""
    sizes = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_experts": [4, 0],
        "intermediate_size": 24,
        "expert_intermediate_size": 12,
        "tie_embeddings": False,
    }
    decoder = build_decoder_config(ModelConfig.model_validate(sizes | shape), VOCAB, max_positions)
    write_tokenizer(folder)
    write_model(folder, decoder, choose_family(decoder))
    return folder


def make_family_folder(folder: Path, family: Family) -> Path:
    """Writes a tiny model of a family."""
    write_tokenizer(folder)
    keys = FAMILY_KEYS[family.model_type] | {"vocab_size": VOCAB}
    write_model(folder, family.read_config(keys), family)
    return folder


def write_model(folder: Path, config: DecoderConfig, family: Family) -> None:
    model = Decoder(config)
    initialize_weights(model, seed=5, std=0.05)
    save_model(model, folder, torch.bfloat16, TOKEN_IDS, family=family)


def write_tokenizer(folder: Path) -> None:
    """Makes the folder with a tokenizer that knows the turns of a conversation."""
    folder.mkdir()
    texts = [f"line {i} of file {i % 7}: apples and pears\n" for i in range(40)]
    train_tokenizer(texts, 300).save(folder)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens([AddedToken(f"<|im_{word}|>", special=True) for word in ("start", "end")])
    inner.save(str(folder / "tokenizer.json"))
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "model_max_length": 99}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
