"""Tokenizers with turns: what the tests of conversations share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from moesys.data import ChatTemplates, Conversation, Tokenizer

TEMPLATES = Path(__file__).parent / "chat_templates"
SPECIAL_NAMES = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
]


def add_turns(tokenizer: Tokenizer, folder: Path, template: str) -> Tokenizer:
    """Returns the tokenizer with special tokens for turns and a chat template, loaded from the folder."""
    tokenizer.save(folder)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_NAMES])
    inner.save(str(folder / "tokenizer.json"))
    keys = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    return Tokenizer.load(folder)


def find_templates(tokenizer: Tokenizer) -> ChatTemplates:
    return ChatTemplates.parse(tokenizer.render_files(), "the tokenizer")


def make_conversation(*turns: str, name: str = "chats:1", **more: Any) -> Conversation:
    """Alternating turns of user and assistant."""
    roles = ("user", "assistant")
    return Conversation(
        name, tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns)), **more
    )
