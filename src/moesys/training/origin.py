"""The model folder that a run starts from, and what of it a run keeps.

A run keeps the configs, not the weights: with them and a checkpoint it goes on, and is exported in the same layout,
when the folder is gone. Knows nothing of optimizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch

from moesys.checkpoint import FolderLayout, load_model, resolve_model, write_text_atomic
from moesys.checkpoint.layout import read_folder_layout
from moesys.checkpoint.model_files import read_json_object
from moesys.config import Config
from moesys.data import Tokenizer, load_tokenizer
from moesys.errors import ConfigError, IneffectiveOptionError, ModelFormatError
from moesys.models import Decoder, DecoderConfig, DenseConfig
from moesys.moe import MoEConfig

_CONFIG_FILE = "config.json"
_GENERATION_FILE = "generation_config.json"
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BALANCE_KEYS = ("balance_loss", "balance_scope", "router_z_loss")


@dataclass(frozen=True)
class Origin:
    """What the config files of a model folder say."""

    folder: Path
    layout: FolderLayout
    generation_keys: dict[str, Any] | None
    """Of ``generation_config.json``; None where there is none."""

    @classmethod
    def open(cls, folder: Path) -> Origin:
        """Reads the configs of a model folder, or those that a run has kept. Raises `ModelFormatError`."""
        generation = folder / _GENERATION_FILE
        layout = read_folder_layout(folder)
        return cls(folder, layout, read_json_object(generation) if generation.exists() else None)

    @property
    def token_ids(self) -> dict[str, Any]:
        """The keys of ``config.json`` that name special tokens."""
        return {key: self.layout.keys[key] for key in _TOKEN_KEYS if key in self.layout.keys}

    def load_model(self, balance_bias_rate: float) -> Decoder:
        """Loads the weights in float32, ready to be trained. Raises `ModelFormatError`."""
        loaded = load_model(self.folder, torch.float32)
        with torch.device("meta"):
            model = Decoder(_set_bias_rate(loaded.config, balance_bias_rate))
        model.load_state_dict(loaded.state_dict(keep_vars=True), strict=True, assign=True)
        return model

    def make_model(self, balance_bias_rate: float) -> Decoder:
        """Returns the model with weights that are still to be filled."""
        return Decoder(_set_bias_rate(self.layout.decoder, balance_bias_rate))

    def keep(self, folder: Path, model: Decoder) -> None:
        """Writes the configs into a folder of the run, with what loading has found out about the head."""
        folder.mkdir(parents=True, exist_ok=True)
        keys = self.layout.keys | {"tie_word_embeddings": model.config.tie_embeddings}
        _write_json(folder / _CONFIG_FILE, keys)
        if self.generation_keys is not None:
            _write_json(folder / _GENERATION_FILE, self.generation_keys)

    def load_tokenizer(self, config: Config) -> Tokenizer:
        """Loads the tokenizer, with the chat template that the config gives in place of its own.

        Raises `ModelFormatError`, `ConfigError` or `IneffectiveOptionError` where tokenizer or settings do not fit the
        model, and `DataError` without a tokenizer.
        """
        tokenizer, decoder = load_tokenizer(config.data, self.folder), self.layout.decoder
        if tokenizer.vocab_size > decoder.vocab_size:
            raise ModelFormatError(
                f"the tokenizer in {self.folder} has {tokenizer.vocab_size} tokens, the model embeds "
                f"{decoder.vocab_size}; they do not belong together"
            )
        if config.data.sequence_length > decoder.position_limit:
            raise ConfigError(
                f"data.sequence_length ({config.data.sequence_length}) must not exceed the {decoder.position_limit} "
                f"positions that {config.model.init} was made for; lower it"
            )
        self._require_effects(config)
        return tokenizer

    def _require_effects(self, config: Config) -> None:
        """Law 9 for what only the model can tell."""
        decoder, name = self.layout.decoder, config.model.init
        balance = [key for key in _BALANCE_KEYS if key in config.training.model_fields_set]
        if balance and not decoder.moe_layer_ids:
            raise IneffectiveOptionError(
                f"training.{balance[0]} has no effect: {name} has no experts; drop the key"
            )
        if config.model.balance_bias_rate and not any(map(_has_selection_bias, decoder.feed_forwards)):
            raise IneffectiveOptionError(
                f"model.balance_bias_rate has no effect: the routers of {name} choose without a bias; drop it"
            )


def find_origin(config: Config, on_message: Callable[[str], None]) -> tuple[Config, Origin | None]:
    """Fetches what ``model.init`` names, and returns the config with the name that finds the same files again.

    ``on_message`` gets a line that says what the run starts from. Raises `ModelFormatError`.
    """
    if config.model.init is None:
        return config, None
    source = resolve_model(config.model.init)
    origin = Origin.open(source.folder)
    on_message(f"starting from {source.name}, a {origin.layout.family.model_type}")
    model = config.model.model_copy(update={"init": source.name})
    return config.model_copy(update={"model": model}), origin


def _set_bias_rate(config: DecoderConfig, rate: float) -> DecoderConfig:
    """Lets the selection bias of routers that have one move by ``rate``."""
    layers = tuple(
        replace(layer, bias_update_rate=rate) if _has_selection_bias(layer) else layer
        for layer in config.feed_forwards
    )
    return replace(config, feed_forwards=layers)


def _has_selection_bias(layer: MoEConfig | DenseConfig) -> TypeGuard[MoEConfig]:
    return isinstance(layer, MoEConfig) and layer.has_selection_bias


def _write_json(path: Path, keys: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(keys, indent=2, ensure_ascii=False) + "\n")
