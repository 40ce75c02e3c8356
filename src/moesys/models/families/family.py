"""A family of checkpoints: its names, its config keys in both directions, and what it cannot hold.

Whether a family holds a model is not written down a second time: a config is written and read again, and what comes
back different does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from moesys.errors import ModelFormatError, MoesysError
from moesys.models.config import DecoderConfig, DenseConfig
from moesys.models.decoder import Decoder
from moesys.models.families.soundness import require_sound
from moesys.models.layout import ExpertStorage, Layout
from moesys.models.mixer import MixerConfig
from moesys.models.stored import StoredTensor
from moesys.moe import MoEConfig


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    model_types:   of ``config.json``; the first is written.
    architecture:  transformers' name of the model.
    layout:        of the tensors.
    read_config:   from the keys of ``config.json`` to our record. May raise `KeyError` for a missing key, and
                   `ModelFormatError` for a value that is not supported.
    write_config:  the keys that `read_config` reads, from our record. Raises `ModelFormatError` for a record that it
                   has no keys for.
    summary:       what sets it apart from a plain decoder, in one line.
    """

    model_types: tuple[str, ...]
    architecture: str
    layout: Layout
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    write_config: Callable[[DecoderConfig], dict[str, Any]]
    summary: str

    @property
    def model_type(self) -> str:
        """The name that is written."""
        return self.model_types[0]

    def read(self, keys: Mapping[str, Any]) -> DecoderConfig:
        """Returns the decoder that the keys of a ``config.json`` describe.

        Raises `KeyError` for a missing key, and `ModelFormatError` for a value that is not supported or not meant.
        """
        config = self.read_config(keys)
        require_sound(config)
        return config

    def list_tensors(self, model: Decoder, present: Collection[str] = ()) -> list[StoredTensor]:
        """Returns every tensor of the checkpoint with its place in the model.

        present: the names in a checkpoint that is read, which decide between layouts where the family has several;
                 empty for the layout that is written.
        """
        return list(self.layout.list_tensors(model, present))

    def with_experts(self, storage: ExpertStorage) -> Family:
        """Returns the family that writes its experts so; raises `ModelFormatError` where no layout of it does."""
        layouts = self.layout.moe
        chosen = [layout for layout in layouts if layout.experts.storage is storage]
        if not layouts:
            raise ModelFormatError(f"{self.model_type} has no experts to store as {storage}; drop the option")
        if not chosen:
            kinds = ", ".join(sorted({layout.experts.storage for layout in layouts}))
            raise ModelFormatError(f"{self.model_type} has no layout with {storage} experts; it has {kinds}")
        others = [layout for layout in layouts if layout not in chosen]
        return replace(self, layout=replace(self.layout, moe=(*chosen, *others)))

    def has_keys_for(self, config: DecoderConfig) -> bool:
        """Whether the model's layers are of the kinds that the family has, be it with options that it has not."""
        try:
            self.write_config(config)
        except ModelFormatError:
            return False
        return True

    def find_misfits(self, config: DecoderConfig) -> list[str]:
        """Returns why a model cannot be written as this family; empty when it can."""
        config = forget_training(config)
        try:
            again = self.read_config(self.write_config(config))
        except MoesysError as error:
            return [str(error)]
        return [
            f"{what} would be {describe(found)}, the model's is {describe(wanted)}"
            for what, wanted, found in _find_differences(config, again)
        ]


def forget_training(config: DecoderConfig) -> DecoderConfig:
    """Returns the config without what only training uses: the rate of a selection bias, not the bias."""
    layers = tuple(
        replace(layer, bias_update_rate=0.0, selection_bias=layer.has_selection_bias)
        if isinstance(layer, MoEConfig)
        else layer
        for layer in config.feed_forwards
    )
    return replace(config, feed_forwards=layers)


_KINDS: dict[type, str] = {MoEConfig: "a MoE layer", DenseConfig: "a dense layer"}


def describe(value: Any) -> str:
    """A value in a sentence: the kind of a layer, anything else as it is."""
    if isinstance(value, MixerConfig):
        return value.kind
    return _KINDS.get(type(value), str(value))


def _find_differences(wanted: Any, found: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (field, value, value) where two records differ; the same difference in several layers once. A field of a
    layer stands by its own name, one of another record behind that record's."""
    seen = set()
    for item in fields(wanted):
        name = f"{path}{item.name}"
        pair = getattr(wanted, item.name), getattr(found, item.name)
        has_layers = _are_layers(*pair)
        for one, other in zip(*pair, strict=True) if has_layers else [pair]:
            if one == other or (name, one, other) in seen:
                continue
            seen.add((name, one, other))
            if is_dataclass(one) and type(one) is type(other):
                for difference in _find_differences(one, other, path if has_layers else f"{name}."):
                    if difference not in seen:
                        seen.add(difference)
                        yield difference
            else:
                yield name.removesuffix("s") if has_layers else name, one, other


def _are_layers(one: Any, other: Any) -> bool:
    return (
        isinstance(one, tuple)
        and isinstance(other, tuple)
        and len(one) == len(other) > 0
        and is_dataclass(one[0])
    )


def require(condition: bool, reason: str) -> None:
    """Raises `ModelFormatError` with the reason where the condition does not hold."""
    if not condition:
        raise ModelFormatError(reason)
