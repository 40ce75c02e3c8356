"""What the tensors of a checkpoint are called and how they lie in our parameters: small records that list them.

A layout is data: names, and for the experts one of a few ways to store a bank. Every entry is a view of a parameter in
the checkpoint's element order, so one list serves reading and writing. Knows nothing of files or config keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

import torch

from moesys.errors import ModelFormatError
from moesys.models.decoder import Block, Decoder
from moesys.models.mixer import Mixer
from moesys.models.mixer_layout import MIXER_LAYOUTS, MixerLayout
from moesys.models.stored import Encoding, StoredTensor
from moesys.models.stored_module import list_module, store
from moesys.moe import ExpertBank, MoELayer, QuantizedBank, QuantizedLinear, SwiGLU


class ExpertStorage(StrEnum):
    """Whether each expert has tensors of its own, or all experts of a layer share theirs."""

    SEPARATE = "separate"
    STACKED = "stacked"


class StoredExperts(Protocol):
    """One way to store the experts of a layer. Implementations are frozen records."""

    @property
    def storage(self) -> ExpertStorage: ...

    @property
    def probe(self) -> str:
        """A name that is in a checkpoint of this layout and in none of another."""
        ...

    def list_tensors(self, bank: ExpertBank) -> Iterator[StoredTensor]:
        """Yields every tensor, named from the layer's feed-forward on."""
        ...


@dataclass(frozen=True)
class SeparateExperts:
    """Three matrices per expert, each (out, in)."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def storage(self) -> ExpertStorage:
        """See `StoredExperts`."""
        return ExpertStorage.SEPARATE

    @property
    def probe(self) -> str:
        """See `StoredExperts`."""
        return f"experts.0.{self.gate}.weight"

    def list_tensors(self, bank: ExpertBank) -> Iterator[StoredTensor]:
        """See `StoredExperts`."""
        for expert_id in range(bank.down_EDF.shape[0]):
            gate_FD, up_FD = bank.gate_up_EFD[expert_id].chunk(2)
            matrices = {self.gate: gate_FD, self.up: up_FD, self.down: bank.down_EDF[expert_id]}
            for name, view in matrices.items():
                yield store(f"experts.{expert_id}.{name}.weight", view)


@dataclass(frozen=True)
class StackedExperts:
    """Two matrices for all experts, stacked: gate rows before up rows, and down, each (experts, out, in)."""

    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"

    @property
    def storage(self) -> ExpertStorage:
        """See `StoredExperts`."""
        return ExpertStorage.STACKED

    @property
    def probe(self) -> str:
        """See `StoredExperts`."""
        return self.gate_up

    def list_tensors(self, bank: ExpertBank) -> Iterator[StoredTensor]:
        """See `StoredExperts`."""
        yield store(self.gate_up, bank.gate_up_EFD)
        yield store(self.down, bank.down_EDF)


@dataclass(frozen=True)
class InterleavedExperts:
    """Stacked experts whose gate and up rows alternate, with biases (gpt-oss).

    encoding:  plain tensors are (experts, in, out), MXFP4 ones (experts, out, in).
    """

    encoding: Encoding = Encoding.PLAIN

    @property
    def storage(self) -> ExpertStorage:
        """See `StoredExperts`."""
        return ExpertStorage.STACKED

    @property
    def probe(self) -> str:
        """See `StoredExperts`."""
        return "experts.gate_up_proj" + ("_blocks" if self.encoding is Encoding.MXFP4 else "")

    def list_tensors(self, bank: ExpertBank) -> Iterator[StoredTensor]:
        """See `StoredExperts`."""
        assert bank.gate_up_bias_EF is not None
        assert bank.down_bias_ED is not None
        num_experts, width, hidden = bank.gate_up_EFD.shape
        gate_up_EFGD = bank.gate_up_EFD.unflatten(1, (2, -1)).transpose(1, 2)
        inner = width // 2
        if self.encoding is Encoding.MXFP4:
            shapes = (num_experts, width, hidden), (num_experts, hidden, inner)
            views = gate_up_EFGD, bank.down_EDF
        else:
            shapes = (num_experts, hidden, width), (num_experts, inner, hidden)
            views = gate_up_EFGD.permute(0, 3, 1, 2), bank.down_EDF.transpose(1, 2)
        yield StoredTensor("experts.gate_up_proj", shapes[0], views[0], self.encoding)
        bias_EFG = bank.gate_up_bias_EF.unflatten(1, (2, -1)).transpose(1, 2)
        yield StoredTensor("experts.gate_up_proj_bias", (num_experts, width), bias_EFG)
        yield StoredTensor("experts.down_proj", shapes[1], views[1], self.encoding)
        yield store("experts.down_proj_bias", bank.down_bias_ED)


@dataclass(frozen=True)
class MoELayout:
    """What a family calls the parts of a MoE layer, from ``prefix`` on.

    router_bias, selection_bias:   of the router, where it has them.
    shared, shared_gate:           prefix of the shared expert, and its gate.
    router_dtype:                  as which router and selection bias are written; None for the model's.
    """

    prefix: str
    experts: StoredExperts
    router: str = "gate.weight"
    router_bias: str = "router.bias"
    selection_bias: str = "gate.e_score_correction_bias"
    shared: str = "shared_expert"
    shared_gate: str = "shared_expert_gate.weight"
    router_dtype: torch.dtype | None = None

    def list_tensors(self, layer: MoELayer) -> Iterator[StoredTensor]:
        """Yields the tensors of a layer, named from the block on."""
        for stored in self._list_unprefixed(layer):
            yield stored.under(self.prefix)

    def _list_unprefixed(self, layer: MoELayer) -> Iterator[StoredTensor]:
        router = layer.router
        yield replace(store(self.router, router.weight_ED), dtype=self.router_dtype)
        if router.bias_E is not None:
            yield store(self.router_bias, router.bias_E)
        if router.selection_bias_E is not None:
            bias = store(self.selection_bias, router.selection_bias_E)
            yield replace(bias, dtype=self.router_dtype)
        assert isinstance(layer.experts, ExpertBank)
        yield from self.experts.list_tensors(layer.experts)
        if layer.shared_expert is not None:
            yield from _list_dense(layer.shared_expert, self.shared)
        if layer.shared_expert_gate is not None:
            yield store(self.shared_gate, layer.shared_expert_gate.weight)


@dataclass(frozen=True)
class Layout:
    """How a family stores a whole decoder.

    moe:  ways to store a MoE layer; the first is written, a checkpoint's own names decide which is read. Empty for a
          family without MoE layers.
    mixers:  what the tensors of each kind of mixer are called.
    may_predict_further:  whether checkpoints may hold, behind the model's last layer, layers that predict further
                          tokens, which are not read.
    """

    moe: tuple[MoELayout, ...] = ()
    mixers: Mapping[type[Mixer], MixerLayout] = field(default_factory=lambda: MIXER_LAYOUTS)
    may_predict_further: bool = False

    def ignores(self, name: str, num_layers: int, present: Collection[str]) -> bool:
        """Whether a checkpoint may hold this tensor and the model not: one that is computed from the config, or one of
        a layer that predicts further tokens, which is known by the projection that only such a layer has.

        present: all names in the checkpoint.
        """
        if name.endswith("rotary_emb.inv_freq"):
            return True
        found = re.match(r"(model\.layers\.(\d+))\.", name)
        if not self.may_predict_further or found is None or int(found[2]) < num_layers:
            return False
        return f"{found[1]}.eh_proj.weight" in present

    def list_tensors(self, model: Decoder, present: Collection[str] = ()) -> Iterator[StoredTensor]:
        """Yields every tensor of the checkpoint.

        present: the names in a checkpoint that is read; empty for the layout that is written. Raises `ModelFormatError`
        before the first for a model with int8 weights, which no layout has names for.
        """
        _require_floats(model)
        yield store("model.embed_tokens.weight", model.embedding.weight)
        for layer_id, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            prefix = f"model.layers.{layer_id}"
            for stored in self._list_block(block, prefix, present):
                yield stored.under(prefix)
        yield from list_module(model.final_norm, "model.norm")
        if model.head is not None:
            yield from list_module(model.head, "lm_head")

    def _list_block(self, block: Block, prefix: str, present: Collection[str]) -> Iterator[StoredTensor]:
        yield from list_module(block.input_norm, "input_layernorm")
        yield from list_module(block.post_mixer_norm, "post_attention_layernorm")
        mixer = self.mixers[type(block.mixer)]
        for stored in mixer.list_tensors(block.mixer):
            yield stored.under(mixer.prefix)
        if isinstance(block.feed_forward, MoELayer):
            yield from self._choose_moe(prefix, present).list_tensors(block.feed_forward)
        else:
            yield from _list_dense(block.feed_forward, "mlp")

    def _choose_moe(self, prefix: str, present: Collection[str]) -> MoELayout:
        for layout in self.moe:
            if f"{prefix}.{layout.prefix}.{layout.experts.probe}" in present:
                return layout
        return self.moe[0]


def _require_floats(model: Decoder) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedBank):
            raise ModelFormatError(
                f"{name} holds int8 weights, and checkpoints in Hugging Face layout hold floats; take the model folder "
                "that these were packed from"
            )


def _list_dense(dense: SwiGLU, prefix: str) -> Iterator[StoredTensor]:
    for name, parameter in dense.gate_up_proj.named_parameters():
        gate, up = parameter.chunk(2)
        yield store(f"{prefix}.gate_proj.{name}", gate)
        yield store(f"{prefix}.up_proj.{name}", up)
    yield from list_module(dense.down_proj, f"{prefix}.down_proj")
