"""The model folder that a run starts from, and what of it a run keeps.

A run keeps the configs, not the weights: with them and a checkpoint it goes on, and is exported in the same layout, when
the folder is gone. Knows nothing of data or optimizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint import ModelSource, load_model, read_layout, resolve_model, write_text_atomic
from moesys.config import Config
from moesys.data import Tokenizer
from moesys.errors import ConfigError, IneffectiveOptionError, ModelFormatError
from moesys.models import Decoder, DecoderConfig, Family
from moesys.moe import MoEConfig

_CONFIG_FILE = "config.json"
_GENERATION_FILE = "generation_config.json"
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BALANCE_KEYS = ("balance_loss", "balance_scope", "router_z_loss")


@dataclass(frozen=True)
class Origin:
    """What the config files of a model folder say."""

    folder: Path
    family: Family
    decoder: DecoderConfig
    config_keys: dict[str, Any]
    """Of ``config.json``."""
    generation_keys: dict[str, Any] | None
    """Of ``generation_config.json``; None where there is none."""

    @classmethod
    def open(cls, folder: Path) -> Origin:
        """Reads the configs of a model folder, or those that a run has kept. Raises `ModelFormatError`."""
        keys, family, decoder = read_layout(folder)
        generation = folder / _GENERATION_FILE
        return cls(folder, family, decoder, keys, _read_json(generation) if generation.exists() else None)

    @property
    def token_ids(self) -> dict[str, Any]:
        """The keys of ``config.json`` that name special tokens."""
        return {key: self.config_keys[key] for key in _TOKEN_KEYS if key in self.config_keys}

    def load_model(self) -> Decoder:
        """Loads the weights in float32, ready to be trained. Raises `ModelFormatError`."""
        return load_model(self.folder, torch.float32).train().requires_grad_(True)

    def keep(self, folder: Path, model: Decoder) -> None:
        """Writes the configs into a folder of the run, with what loading has found out about the head."""
        folder.mkdir(parents=True, exist_ok=True)
        keys = self.config_keys | {"tie_word_embeddings": model.config.tie_embeddings}
        _write_json(folder / _CONFIG_FILE, keys)
        if self.generation_keys is not None:
            _write_json(folder / _GENERATION_FILE, self.generation_keys)

    def require_fit(self, config: Config, tokenizer: Tokenizer) -> None:
        """Raises `ModelFormatError`, `ConfigError` or `IneffectiveOptionError` where tokenizer or settings do not fit
        the model."""
        if tokenizer.vocab_size > self.decoder.vocab_size:
            raise ModelFormatError(
                f"the tokenizer in {self.folder} has {tokenizer.vocab_size} tokens, the model embeds "
                f"{self.decoder.vocab_size}; they do not belong together"
            )
        if config.data.sequence_length > self.decoder.max_positions:
            raise ConfigError(
                f"data.sequence_length ({config.data.sequence_length}) must not exceed the {self.decoder.max_positions} "
                f"positions that {config.model.init} was made for; lower it"
            )
        balance = [key for key in _BALANCE_KEYS if key in config.training.model_fields_set]
        if balance and not self.decoder.moe_layer_ids:
            raise IneffectiveOptionError(
                f"training.{balance[0]} has no effect: {config.model.init} has no experts; drop the key"
            )
        can_balance = any(
            isinstance(layer, MoEConfig) and layer.has_selection_bias for layer in self.decoder.feed_forwards
        )
        if config.model.balance_bias_rate and not can_balance:
            raise IneffectiveOptionError(
                f"model.balance_bias_rate has no effect: the routers of a {self.family.model_type} have no bias for the "
                "choice; drop the key"
            )


def find_origin(config: Config, on_message: Callable[[str], None]) -> tuple[Config, Origin | None]:
    """Fetches what ``model.init`` names, and returns the config with the name that finds the same files again.

    ``on_message`` gets a line that says what the run starts from. Raises `ModelFormatError`.
    """
    if config.model.init is None:
        return config, None
    source: ModelSource = resolve_model(config.model.init)
    origin = Origin.open(source.folder)
    on_message(f"starting from {source.name}, a {origin.family.model_type}")
    model = config.model.model_copy(update={"init": source.name})
    return config.model_copy(update={"model": model}), origin


def with_balance_bias(model: Decoder, rate: float) -> Decoder:
    """Returns the model with routers whose selection bias moves by ``rate``; the weights are the same tensors."""
    if not rate:
        return model
    layers = tuple(
        replace(layer, bias_update_rate=rate)
        if isinstance(layer, MoEConfig) and layer.has_selection_bias
        else layer
        for layer in model.config.feed_forwards
    )
    with torch.device("meta"):
        again = Decoder(replace(model.config, feed_forwards=layers))
    again.load_state_dict(model.state_dict(keep_vars=True), strict=True, assign=True)
    return again


def _read_json(path: Path) -> dict[str, Any]:
    keys = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(keys, dict):
        raise ModelFormatError(f"{path} must hold a JSON object")
    return keys


def _write_json(path: Path, keys: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(keys, indent=2, ensure_ascii=False) + "\n")
