"""bfloat16: no further from the float32 logits than transformers is, the routing of float32 replayed in both."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from oracle import Checkpoint, compute_logits, load_theirs, make_tokens
from torch import Tensor
from torch.overrides import TorchFunctionMode

from family_keys import FAMILY_KEYS, VARIANT_KEYS
from moesys.checkpoint import load_model
from moesys.inference import Engine, SequenceStep
from moesys.models import Decoder, DocumentAttend
from moesys.moe import Choice, MoEConfig, Router, find_layers

TOKENS = make_tokens()


class PinnedChoice(TorchFunctionMode):
    """In it, whoever asks for the best experts of each token gets those of a table: all k at once, or one by one.

    tables: (tokens, k) int64 of each MoE layer in turn.
    """

    def __init__(self, tables: list[Tensor], num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.tables = iter(tables)
        self.columns: Iterator[Tensor] = iter(())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, tuple) or args[0].shape[1:] != (self.num_experts,):
            return result
        if func in (torch.topk, Tensor.topk):
            ids = next(self.tables)
        elif func in (torch.max, Tensor.max):
            ids = next(self.columns, None)
            if ids is None:
                first, *others = next(self.tables).split(1, dim=1)
                ids, self.columns = first, iter(others)
        else:
            return result
        return type(result)((args[0].gather(1, ids), ids))


def replay(model: Decoder, tables: dict[int, Tensor]) -> None:
    """Gives every router its choice, as the tables are when it is asked."""
    for layer_id, layer in find_layers(model).items():
        layer.router.register_forward_pre_hook(
            lambda _, args, kwargs, layer_id=layer_id: (
                args,
                kwargs | {"given": Choice.from_table(tables[layer_id])},
            ),
            with_kwargs=True,
        )


def choose_experts(model: Decoder) -> dict[int, Tensor]:
    """(tokens, k) experts by layer."""
    positions = torch.arange(TOKENS.shape[1]).expand(TOKENS.shape)
    routings = model(TOKENS, positions, DocumentAttend(None)).routings
    return {i: routing.expert_ids.view(routing.num_tokens, -1) for i, routing in routings.items()}


def measure(found: Tensor, exact: Tensor) -> float:
    return (found.float() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("checkpoint", VARIANT_KEYS, indirect=True)
@torch.no_grad()
def test_bfloat16_is_as_exact_as_transformers(
    checkpoint: Checkpoint, record_property: pytest.RecordProperty
) -> None:
    exact = checkpoint.theirs(TOKENS).logits
    tables = choose_experts(checkpoint.ours)
    ours = load_model(checkpoint.folder, torch.bfloat16)
    theirs = load_theirs(checkpoint.folder, torch.bfloat16)
    free = choose_experts(ours)
    flips = sum(int((free[i].sort().values != tables[i].sort().values).any(1).sum()) for i in tables)
    record_property("tokens routed otherwise in bfloat16", flips)
    moe = [layer for layer in checkpoint.ours.config.feed_forwards if isinstance(layer, MoEConfig)]
    replay(ours, tables)
    with PinnedChoice(list(tables.values()), moe[0].num_experts if moe else 0) as pinned:
        logits = theirs(TOKENS).logits
    assert next(pinned.tables, None) is None, "transformers did not ask for every layer's choice"
    assert measure(compute_logits(ours, TOKENS), exact) <= 1.5 * measure(logits, exact)


@pytest.mark.parametrize("checkpoint", VARIANT_KEYS, indirect=True)
@torch.no_grad()
def test_bfloat16_with_a_cache_is_as_exact_as_transformers_without(checkpoint: Checkpoint) -> None:
    """A prompt in two pieces, then token by token; latents are kept and attended to as they are."""
    row = TOKENS[:1]
    exact = checkpoint.theirs(row).logits[0]
    tables = {i: table[: row.shape[1]] for i, table in choose_experts(checkpoint.ours).items()}
    engine = Engine(ours := load_model(checkpoint.folder, torch.bfloat16))
    theirs = load_theirs(checkpoint.folder, torch.bfloat16)
    moe = [layer for layer in checkpoint.ours.config.feed_forwards if isinstance(layer, MoEConfig)]
    with PinnedChoice(list(tables.values()), moe[0].num_experts if moe else 0):
        logits = theirs(row).logits[0]
    current = dict(tables)
    replay(ours, current)
    sequence = engine.open_sequence(row.shape[1])
    parts: list[Tensor] = []
    for start, end in pairwise([0, 3, 20, *range(21, row.shape[1] + 1)]):
        current.update({i: table[start:end] for i, table in tables.items()})
        parts += engine.step([SequenceStep(sequence, start, row[0, start:end].tolist())])
    assert measure(torch.cat(parts), exact) <= 1.5 * measure(logits, exact)


@pytest.mark.parametrize("checkpoint", FAMILY_KEYS, indirect=True)
def test_bfloat16_keeps_the_routers_in_float32(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint.folder, torch.bfloat16)
    routers = {name for name, module in model.named_modules() if isinstance(module, Router)}
    for name, tensor in model.state_dict().items():
        expected = torch.float32 if name.rpartition(".")[0] in routers else torch.bfloat16
        assert tensor.dtype == expected, name
