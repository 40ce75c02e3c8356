"""Law 2 on a real model: within a budget of memory it computes the bits of the resident one.

The same fixed tokens run through both: a prompt in two passes, each of which is expected to need nearly all experts, so
that they come in the order of the layers, and then token by token. Where the whole model does not fit
in memory beside nothing else, each MoE layer is held against its resident self instead: the layer's inputs in the
offloaded run are computed once more with all of that layer's experts in memory, one layer at a time; everything else
of the model is the same memory in both. Knows nothing of commands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from moesys.checkpoint import load_model, open_weights
from moesys.errors import GenerationError
from moesys.inference.engine import Engine, SequenceStep
from moesys.inference.offload import OffloadedModel, load_offloaded
from moesys.inference.offload_plan import OffloadRequest, plan_offload
from moesys.kernels import BankView, ModuleView
from moesys.models import Decoder, DecoderConfig
from moesys.moe import Execution, MoEConfig, MoELayer, find_layers
from moesys.planning import read_free_ram_bytes
from moesys.store import SectionReader, SlotPool, Urgency

_NUM_PASSES = 2
_PASS_TOKENS = range(24, 513)
_NEEDED_SHARE = 0.99
"""Of each layer's experts that a pass over the prompt would need if all were needed alike: enough for routers that
prefer some."""
_NUM_DECODED_TOKENS = 16
_SLACK_BYTES = 2**30
"""Beside the weights, when a whole model is loaded: what loading and computing take."""


@dataclass(frozen=True)
class CheckedTokens:
    """What is computed: a prompt in passes, then the other tokens, one by one."""

    token_ids: tuple[int, ...]
    pass_tokens: int

    @classmethod
    def draw(cls, config: DecoderConfig) -> Self:
        """Returns fixed random tokens for a model, as many as its experts and its positions ask for."""
        pass_tokens = count_pass_tokens(config)
        num_tokens = _NUM_PASSES * pass_tokens + _NUM_DECODED_TOKENS
        generator = torch.Generator().manual_seed(0)
        return cls(
            tuple(torch.randint(0, config.vocab_size, (num_tokens,), generator=generator).tolist()),
            pass_tokens,
        )

    def list_passes(self) -> list[tuple[int, ...]]:
        """Returns the tokens of each pass through the model."""
        prompt_tokens = _NUM_PASSES * self.pass_tokens
        starts = range(0, prompt_tokens, self.pass_tokens)
        prompt = [self.token_ids[start : start + self.pass_tokens] for start in starts]
        return prompt + [(token_id,) for token_id in self.token_ids[prompt_tokens:]]


def count_pass_tokens(config: DecoderConfig) -> int:
    """Returns how many tokens, each choosing k of a layer's E experts on its own, are expected to need 99 % of them in
    every layer: n with 1 - (1 - k / E)^n >= 0.99; 24 to 512, and never more than there are positions for."""
    shares = [
        layer.top_k / layer.num_experts for layer in config.feed_forwards if isinstance(layer, MoEConfig)
    ]
    needed = max((_count_tokens(share) for share in shares), default=0)
    most = (config.position_limit - _NUM_DECODED_TOKENS) // _NUM_PASSES
    return max(1, min(max(needed, _PASS_TOKENS.start), _PASS_TOKENS[-1], most))


def _count_tokens(share: float) -> int:
    return 1 if share >= 1 else math.ceil(math.log(1 - _NEEDED_SHARE) / math.log(1 - share))


@dataclass(frozen=True)
class Comparison:
    """Values of an offloaded run beside those of the resident one.

    predicts:            whether experts were read on a guess.
    num_slots:           experts that could be in memory.
    num_different:       values whose bits differ, of ``num_values``.
    largest_difference:  of them, beside the largest resident value ``largest_value``.
    first:               where the first of them is; None without any.
    """

    predicts: bool
    num_slots: int
    num_values: int
    num_different: int
    largest_difference: float
    largest_value: float
    first: str | None

    @property
    def is_equal(self) -> bool:
        return self.num_different == 0

    def describe(self) -> str:
        """One line for people."""
        run = f"{self.num_slots} experts in memory{', others guessed' if self.predicts else ''}"
        if self.is_equal:
            return f"{run}: {self.num_values} values are equal bit for bit"
        return (
            f"{run}: {self.num_different} of {self.num_values} values DIFFER, by up to "
            f"{self.largest_difference:.3g} of values up to {self.largest_value:.3g}; the first in {self.first}"
        )


@dataclass(frozen=True)
class EqualityCheck:
    """What `verify_model` found.

    by_layer:  whether each MoE layer was held against itself, because the whole model does not fit in memory; else the
               logits of the whole were compared.
    """

    by_layer: bool
    num_tokens: int
    comparisons: tuple[Comparison, ...]

    @property
    def is_equal(self) -> bool:
        return all(comparison.is_equal for comparison in self.comparisons)


def verify_model(
    model: Path,
    host_memory: str | None = None,
    *,
    by_layer: bool | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> EqualityCheck:
    """Runs fixed random tokens with few, some and as many experts in memory as the budget holds, with some once more
    while others are read on a guess, and compares.

    host_memory:  the budget; None for what every token uses and half of the experts.
    by_layer:     whether to compare layer by layer; None where the whole does not fit in the memory that is free.
    on_stage:     is told what is being done.

    Raises `GenerationError` for a budget that cannot hold the model, `ModelFormatError` for one that has no experts.
    """
    budget = _halve_experts(model) if host_memory is None else host_memory
    with open_weights(model) as weights:
        tokens = CheckedTokens.draw(weights.config)
        request = OffloadRequest(budget, num_positions=len(tokens.token_ids))
        plan = plan_offload(model, weights, request)
        least_slots, most_slots = plan.footprint.num_shapes, plan.tier.num_experts
        needed_bytes = plan.footprint.weight_bytes + _SLACK_BYTES
    if by_layer is None:
        by_layer = needed_bytes > read_free_ram_bytes()
    resident: list[Tensor] = []
    if not by_layer:
        on_stage("computing with all weights in memory")
        resident = compute_logits(load_model(model), None, tokens)
    comparisons = []
    some_slots = max(least_slots, (most_slots + 1) // 2)
    runs = [
        (num_slots, False)
        for num_slots in sorted({max(least_slots, min(2, most_slots)), some_slots, most_slots})
    ]
    for num_slots, predicts in [*runs, (some_slots, True)]:
        on_stage(f"computing with {num_slots} experts in memory{', others guessed' if predicts else ''}")
        run = replace(request, num_slots=num_slots, predicts=predicts)
        with load_offloaded(model, run) as offloaded:
            if by_layer:
                comparisons.append(_compare_layers(offloaded, tokens, on_stage))
            else:
                found = compute_logits(offloaded.model, offloaded.execution, tokens)
                names = [f"the logits of pass {i}" for i in range(len(found))]
                comparisons.append(_compare(run, names, found, resident))
    return EqualityCheck(by_layer, len(tokens.token_ids), tuple(comparisons))


def _halve_experts(model: Path) -> str:
    with open_weights(model) as weights:
        sizes = [section.num_bytes for section in weights.experts.sections.values()]
        core_bytes = weights.resident_bytes
    kept_bytes = core_bytes + max(sum(sizes) / 2, 2 * max(sizes))
    share = min(1.0, kept_bytes / (core_bytes + sum(sizes)) + 1e-6)
    return f"{share:.6%}"


def compute_logits(model: Decoder, execution: Execution | None, tokens: CheckedTokens) -> list[Tensor]:
    """Returns the (tokens, vocabulary) logits of each pass."""
    engine = Engine(model, execution)
    sequence_id = engine.open_sequence(len(tokens.token_ids))
    logits: list[Tensor] = []
    position = 0
    for token_ids in tokens.list_passes():
        logits += engine.step([SequenceStep(sequence_id, position, token_ids)])
        position += len(token_ids)
    engine.close_sequence(sequence_id)
    return logits


@dataclass(frozen=True)
class _Call:
    """What a MoE layer was given and returned."""

    x: Tensor
    y: Tensor


class _WholeLayer:
    """An expert source with all experts of one layer, each in the slot of its own number."""

    def __init__(self, view: BankView) -> None:
        self._view = view

    def hint(self, layer_id: int, routing: object) -> None:
        """See `ExpertSource`. There is nothing to load."""

    def acquire(self, layer_id: int, demand: Tensor) -> Generator[BankView | ModuleView, None, None]:
        """See `ExpertSource`. Does not look at the demand."""
        yield self._view

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """See `ExpertSource`. Nothing was pinned."""


def _compare_layers(
    offloaded: OffloadedModel, tokens: CheckedTokens, on_stage: Callable[[str], None]
) -> Comparison:
    layers = find_layers(offloaded.model)
    with _recording(layers) as calls:
        compute_logits(offloaded.model, offloaded.execution, tokens)
    names, found, resident = [], [], []
    for layer_id, layer in layers.items():
        on_stage(f"computing layer {layer_id} with all its experts in memory")
        execution = replace(offloaded.execution, source=_WholeLayer(_read_whole_layer(offloaded, layer_id)))
        for i, call in enumerate(calls[layer_id]):
            with torch.no_grad():
                y, _ = layer(call.x, execution)
            names.append(f"layer {layer_id}, pass {i}")
            found.append(call.y)
            resident.append(y)
    return _compare(offloaded.plan.request, names, found, resident)


@contextmanager
def _recording(layers: dict[int, MoELayer]) -> Iterator[dict[int, list[_Call]]]:
    calls: dict[int, list[_Call]] = {layer_id: [] for layer_id in layers}

    def record(layer: torch.nn.Module, arguments: tuple, outputs: tuple) -> None:
        assert isinstance(layer, MoELayer)
        calls[layer.layer_id].append(_Call(arguments[0].clone(), outputs[0].clone()))

    handles = [layer.register_forward_hook(record) for layer in layers.values()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _read_whole_layer(offloaded: OffloadedModel, layer_id: int) -> BankView:
    """Reads all experts of a layer into memory of their own, not through the slots of the run that is checked."""
    layout = offloaded.experts.layouts[layer_id]
    sections = {
        expert: section
        for (layer, expert), section in offloaded.experts.sections.items()
        if layer == layer_id
    }
    pool = SlotPool(len(sections), layout.part_shapes)
    with SectionReader() as reader:
        reads = [
            reader.submit(
                section,
                [pool.open_part(expert, e.part, e.part_offset, e.num_bytes) for e in section.extents],
                Urgency.DEMAND,
            )
            for expert, section in sections.items()
        ]
        for read in reads:
            reader.wait_any([read])
            if read.error is not None:
                raise read.error
    view = layout.make_view(pool.parts, torch.arange(len(sections)))
    return replace(view, slot_of_expert=None)


def _compare(
    run: OffloadRequest, names: Sequence[str], found: Sequence[Tensor], resident: Sequence[Tensor]
) -> Comparison:
    assert run.num_slots is not None
    if len(found) != len(resident):
        raise GenerationError(f"{len(found)} results cannot be compared with {len(resident)}")
    num_different, largest_difference, first = 0, 0.0, None
    for name, ours, theirs in zip(names, found, resident, strict=True):
        # NaN differs from itself, and what is meant are bits.
        differs = ours.view(torch.uint8) != theirs.view(torch.uint8)
        if not bool(differs.any()):
            continue
        first = first or name
        num_different += int((differs.unflatten(-1, (-1, ours.itemsize))).any(dim=-1).sum())
        largest_difference = max(largest_difference, float((ours.float() - theirs.float()).abs().max()))
    return Comparison(
        run.predicts,
        run.num_slots,
        sum(values.numel() for values in resident),
        num_different,
        largest_difference,
        max(float(values.float().abs().max()) for values in resident),
        first,
    )
