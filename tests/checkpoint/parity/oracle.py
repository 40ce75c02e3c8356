"""transformers as the oracle: small models of it with weights that hide nothing, and logits of both sides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from family_keys import VARIANT_KEYS, Keys
from moesys.checkpoint import load_model
from moesys.models import Decoder, DocumentAttend
from moesys.moe import Execution

VOCAB = 64
LENGTH = 48
"""Beyond every sliding window and every original context of YaRN here, within longrope's."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that transformers has saved, and the model that it saved."""

    folder: Path
    theirs: Any

    @cached_property
    def ours(self) -> Decoder:
        """What we load from it, for inference."""
        return load_model(self.folder)


def make_theirs(keys: Keys) -> Any:
    """Returns transformers' float32 model in which no norm is one, no bias zero and no score tied."""
    keys = {"pad_token_id": None, **keys}
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.25 * noise)
    model.tie_weights()
    return model


def save_theirs(name: str, folder: Path) -> Checkpoint:
    """Saves a variant of `VARIANT_KEYS` in the layout of the hub."""
    theirs = make_theirs(VARIANT_KEYS[name])
    theirs.save_pretrained(folder)
    return Checkpoint(folder, theirs)


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Loads a folder with transformers, which must find every tensor it needs and no other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert {problem: names for problem, names in info.items() if names} == {}
    return model.eval()


def make_tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def compute_logits(model: Decoder, tokens: Tensor, execution: Execution | None = None) -> Tensor:
    """(batch, sequence, vocabulary) logits of ours, without a cache."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return model.compute_logits(model(tokens, positions, DocumentAttend(None), execution).hidden_BSD)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Numeric equality of float32."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
