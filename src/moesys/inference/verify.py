"""Law 2 on a real model: within a budget of memory it computes the bits of the resident one.

The same fixed tokens run through both, a prompt in one pass and then token by token. Where the whole model does not fit
in memory beside nothing else, each MoE layer is held against its resident self instead: the layer's inputs in the
offloaded run are computed once more with all of that layer's experts in memory, one layer at a time; everything else
of the model is the same memory in both. Knows nothing of commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moesys.checkpoint import load_model, open_weights
from moesys.errors import GenerationError
from moesys.inference.engine import Engine, SequenceStep
from moesys.inference.offload import OffloadedModel, load_offloaded
from moesys.inference.offload_plan import OffloadRequest, plan_offload
from moesys.kernels import BankView, ModuleView
from moesys.models import Decoder
from moesys.moe import Execution, MoELayer, find_layers
from moesys.planning import read_free_ram_bytes
from moesys.store import SectionReader, SlotPool, Urgency

NUM_PROMPT_TOKENS = 48
NUM_DECODED_TOKENS = 16
_SLACK_BYTES = 2**30
"""Beside the weights, when a whole model is loaded: what loading and computing take."""


@dataclass(frozen=True)
class Comparison:
    """Values of an offloaded run beside those of the resident one.

    num_slots:           experts that could be in memory.
    num_different:       values whose bits differ, of ``num_values``.
    largest_difference:  of them, beside the largest resident value ``largest_value``.
    first:               where the first of them is; None without any.
    """

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
        if self.is_equal:
            return f"{self.num_slots} experts in memory: {self.num_values} values are equal bit for bit"
        return (
            f"{self.num_slots} experts in memory: {self.num_different} of {self.num_values} values DIFFER, by up to "
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
    """Runs fixed random tokens with few, some and as many experts in memory as the budget holds, and compares.

    host_memory:  the budget; None for what every token uses and half of the experts.
    by_layer:     whether to compare layer by layer; None where the whole does not fit in the memory that is free.
    on_stage:     is told what is being done.

    Raises `GenerationError` for a budget that cannot hold the model, `ModelFormatError` for one that has no experts.
    """
    request = OffloadRequest(
        _halve_experts(model) if host_memory is None else host_memory,
        num_positions=NUM_PROMPT_TOKENS + NUM_DECODED_TOKENS,
    )
    with open_weights(model) as weights:
        plan, config = plan_offload(model, weights, request), weights.config
        most_slots = plan.tier.num_experts
        needed_bytes = plan.footprint.weight_bytes + _SLACK_BYTES
    if by_layer is None:
        by_layer = needed_bytes > read_free_ram_bytes()
    draw = torch.Generator().manual_seed(0)
    num_tokens = NUM_PROMPT_TOKENS + NUM_DECODED_TOKENS
    token_ids = torch.randint(0, config.vocab_size, (num_tokens,), generator=draw).tolist()
    resident: list[Tensor] = []
    if not by_layer:
        on_stage("computing with all weights in memory")
        resident = compute_logits(load_model(model), None, token_ids)
    comparisons = []
    for num_slots in sorted({min(2, most_slots), (most_slots + 1) // 2, most_slots}):
        on_stage(f"computing with {num_slots} experts in memory")
        with load_offloaded(model, replace(request, num_slots=num_slots)) as offloaded:
            if by_layer:
                comparisons.append(_compare_layers(offloaded, token_ids, on_stage))
            else:
                found = compute_logits(offloaded.model, offloaded.execution, token_ids)
                names = [f"the logits of pass {i}" for i in range(len(found))]
                comparisons.append(_compare(num_slots, names, found, resident))
    return EqualityCheck(by_layer, num_tokens, tuple(comparisons))


def _halve_experts(model: Path) -> str:
    with open_weights(model) as weights:
        sizes = [section.num_bytes for section in weights.experts.sections.values()]
        core_bytes = weights.resident_bytes
    kept_bytes = core_bytes + max(sum(sizes) / 2, 2 * max(sizes))
    share = min(1.0, kept_bytes / (core_bytes + sum(sizes)) + 1e-6)
    return f"{share:.6%}"


def compute_logits(model: Decoder, execution: Execution | None, token_ids: Sequence[int]) -> list[Tensor]:
    """Returns the (tokens, vocabulary) logits of a prompt in one pass and of the other tokens, one by one."""
    engine = Engine(model, execution)
    sequence_id = engine.open_sequence(len(token_ids))
    prompt, rest = token_ids[:NUM_PROMPT_TOKENS], token_ids[NUM_PROMPT_TOKENS:]
    logits = engine.step([SequenceStep(sequence_id, 0, prompt)])
    for position, token_id in enumerate(rest, NUM_PROMPT_TOKENS):
        logits += engine.step([SequenceStep(sequence_id, position, [token_id])])
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

    def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView | ModuleView]:
        """See `ExpertSource`. Does not look at the demand."""
        yield self._view

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """See `ExpertSource`. Nothing was pinned."""


def _compare_layers(
    offloaded: OffloadedModel, token_ids: Sequence[int], on_stage: Callable[[str], None]
) -> Comparison:
    layers = find_layers(offloaded.model)
    with _recording(layers) as calls:
        compute_logits(offloaded.model, offloaded.execution, token_ids)
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
    return _compare(offloaded.plan.tier.num_experts, names, found, resident)


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
    num_slots: int, names: Sequence[str], found: Sequence[Tensor], resident: Sequence[Tensor]
) -> Comparison:
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
        num_slots,
        sum(values.numel() for values in resident),
        num_different,
        largest_difference,
        max(float(values.float().abs().max()) for values in resident),
        first,
    )
